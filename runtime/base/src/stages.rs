//! Where the time of a call goes. A [`stage`] is a part of it with a name, and parts are within each other. What
//! it took is kept where somebody keeps it ([`Kept`]), and is a span of OpenTelemetry's where the call is traced;
//! else nothing is measured.
//!
//! Which call a stage belongs to goes with the future that is polled, as OpenTelemetry's context does. Work that
//! another task does for the call is told so by [`Call`].
//!
//! Names and attributes leave the node: no command, environment, password or message of an error is one.

use std::{
    borrow::Cow,
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use opentelemetry::{
    Context, KeyValue, global,
    trace::{FutureExt, SpanBuilder, Status, TraceContextExt},
};

/// The attribute of a pod's id.
pub const POD: &str = "hull.pod.id";
/// The attribute of a container's id, as OpenTelemetry's conventions have it.
pub const CONTAINER: &str = "container.id";
/// Names the code that spans come from.
const SCOPE: &str = "hull";
/// Most stages that are kept of a call.
const MOST: usize = 128;
/// Most bytes of an attribute.
const ATTRIBUTE_MAX: usize = 256;

/// A part of a call that took time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stage {
    /// What was done.
    pub name: Cow<'static, str>,
    /// The stage that it is within, by its place in the list.
    pub within: Option<usize>,
    /// When it began, since the first one could, in microseconds.
    pub begin_us: u64,
    /// How long it took, in microseconds.
    pub us: u64,
    /// Whether it failed, or was given up.
    pub failed: bool,
}

/// Keeps the stages of what it is told to, in the order of their begin.
#[derive(Debug, Clone)]
pub struct Kept(Arc<List>);

#[derive(Debug)]
struct List {
    begin: Instant,
    stages: Mutex<Vec<Stage>>,
}

impl Default for Kept {
    fn default() -> Self {
        Self(Arc::new(List {
            begin: Instant::now(),
            stages: Mutex::default(),
        }))
    }
}

impl Kept {
    /// Does the work and keeps its stages.
    pub fn of<T>(&self, work: impl Future<Output = T>) -> impl Future<Output = T> {
        let place = Place {
            list: Arc::clone(&self.0),
            within: None,
        };
        work.with_context(Context::current_with_value(place))
    }

    /// What was kept until now, and how long that is, in microseconds.
    #[must_use]
    pub fn stages(&self) -> (Vec<Stage>, u64) {
        let stages = self.0.lock().clone();
        (stages, micros(self.0.begin.elapsed()))
    }
}

impl List {
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Stage>> {
        self.stages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where the stages of a context are kept.
#[derive(Debug, Clone)]
struct Place {
    list: Arc<List>,
    within: Option<usize>,
}

impl Place {
    /// Keeps one more; it has failed until it is over. None: there are too many.
    fn add(&self, name: Cow<'static, str>, begin: Instant, us: u64) -> Option<Self> {
        let mut stages = self.list.lock();
        (stages.len() < MOST).then(|| {
            stages.push(Stage {
                name,
                within: self.within,
                begin_us: micros(begin.saturating_duration_since(self.list.begin)),
                us,
                failed: true,
            });
            Self {
                list: Arc::clone(&self.list),
                within: Some(stages.len() - 1),
            }
        })
    }

    fn change(&self, change: impl FnOnce(&mut Stage)) {
        let mut stages = self.list.lock();
        if let Some(stage) = self.within.and_then(|index| stages.get_mut(index)) {
            change(stage);
        }
    }
}

/// A stage that is under way. One that is given up has failed.
struct Open {
    context: Context,
    place: Option<Place>,
    begin: Instant,
    succeeded: bool,
}

impl Drop for Open {
    fn drop(&mut self) {
        let span = self.context.span();
        if !self.succeeded {
            span.set_status(Status::error(""));
        }
        span.end();
        if let Some(place) = &self.place {
            place.change(|stage| {
                stage.us = micros(self.begin.elapsed());
                stage.failed = !self.succeeded;
            });
        }
    }
}

/// Does a part of a call.
pub async fn stage<T, E>(
    name: impl Into<Cow<'static, str>>,
    work: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    let outer = Context::current();
    let place = outer.get::<Place>();
    let is_traced = is_traced(&outer);
    if place.is_none() && !is_traced {
        return work.await;
    }
    let (name, begin) = (name.into(), Instant::now());
    let place = place.and_then(|place| place.add(name.clone(), begin, 0));
    let mut context = outer.clone();
    if is_traced {
        context = context.with_span(
            SpanBuilder::from_name(name).start_with_context(&global::tracer(SCOPE), &outer),
        );
    }
    if let Some(place) = &place {
        context = context.with_value(place.clone());
    }
    let mut open = Open {
        context: if is_traced {
            context.clone()
        } else {
            Context::new()
        },
        place,
        begin,
        succeeded: false,
    };
    let result = work.with_context(context).await;
    open.succeeded = result.is_ok();
    result
}

/// Adds what the call is about to its span.
pub fn attribute(key: &'static str, value: &str) {
    Context::map_current(|context| {
        if is_traced(context) {
            let end = value.floor_char_boundary(ATTRIBUTE_MAX);
            let value = value.get(..end).unwrap_or_default().to_owned();
            context.span().set_attribute(KeyValue::new(key, value));
        }
    });
}

fn is_traced(context: &Context) -> bool {
    context.has_active_span() && context.span().span_context().is_sampled()
}

/// A call, or a stage of it, for what belongs to it and is done or told elsewhere.
#[derive(Clone)]
pub struct Call(Context);

impl fmt::Debug for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Call")
    }
}

impl Call {
    /// The one that this belongs to, if any.
    #[must_use]
    pub fn current() -> Self {
        Self(Context::current())
    }

    /// For what belongs to none.
    #[must_use]
    pub fn none() -> Self {
        Self(Context::new())
    }

    /// Does work that belongs to it.
    pub fn of<T>(self, work: impl Future<Output = T>) -> impl Future<Output = T> {
        work.with_context(self.0)
    }

    /// Adds a stage that somebody else measured, and that is over.
    pub fn measured(&self, name: impl Into<Cow<'static, str>>, begin: Instant, took: Duration) {
        let name = name.into();
        if is_traced(&self.0)
            && let Some(start) = SystemTime::now().checked_sub(begin.elapsed())
        {
            let span = SpanBuilder::from_name(name.clone()).with_start_time(start);
            let span = span.start_with_context(&global::tracer(SCOPE), &self.0);
            let context = Context::new().with_span(span);
            context.span().end_with_timestamp(start + took);
        }
        let place = self.0.get::<Place>();
        if let Some(place) = place.and_then(|place| place.add(name, begin, micros(took))) {
            place.change(|stage| stage.failed = false);
        }
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::{convert::Infallible, future::pending};

    use tokio::time::timeout;

    use super::*;

    async fn nothing() -> Result<(), Infallible> {
        Ok(())
    }

    #[tokio::test]
    async fn stages_are_kept_within_those_that_they_are_parts_of() {
        let kept = Kept::default();
        let work = stage("outer", async {
            let (first, second) = tokio::join!(
                stage("first", nothing()),
                stage("second", async { stage("third", nothing()).await })
            );
            first.and(second)?;
            Call::current().measured("told", Instant::now(), Duration::from_micros(7));
            Ok::<_, Infallible>(
                tokio::spawn(Call::current().of(stage("elsewhere", nothing()))).await,
            )
        });
        kept.of(work).await.unwrap().unwrap().unwrap();
        // Of another call.
        stage("other", nothing()).await.unwrap();
        let (stages, total) = kept.stages();
        let tree: Vec<_> = stages
            .iter()
            .map(|stage| (&*stage.name, stage.within))
            .collect();
        let outer = Some(0);
        assert_eq!(
            tree,
            [
                ("outer", None),
                ("first", outer),
                ("second", outer),
                ("third", Some(2)),
                ("told", outer),
                ("elsewhere", outer)
            ]
        );
        assert!(stages.iter().all(|stage| !stage.failed));
        assert!(
            stages
                .iter()
                .all(|stage| stage.begin_us + stage.us <= total + 7)
        );
        assert_eq!(stages[4].us, 7);
    }

    #[tokio::test(start_paused = true)]
    async fn what_failed_or_was_given_up_says_so() {
        let kept = Kept::default();
        let failing = stage("failing", async { Err::<(), _>(()) });
        kept.of(failing).await.unwrap_err();
        let given_up = stage("given up", pending::<Result<(), ()>>());
        let limit = Duration::from_millis(1);
        timeout(limit, kept.of(given_up)).await.unwrap_err();
        let (stages, _) = kept.stages();
        let failed: Vec<_> = stages
            .iter()
            .map(|stage| (&*stage.name, stage.failed))
            .collect();
        assert_eq!(failed, [("failing", true), ("given up", true)]);
    }

    #[tokio::test]
    async fn a_call_without_end_is_kept_in_part() {
        let kept = Kept::default();
        for _ in 0..2 * MOST {
            kept.of(stage("again", nothing())).await.unwrap();
        }
        assert_eq!(kept.stages().0.len(), MOST);
    }
}
