//! Wall-clock time in the forms that others are told, when it is set, and deadlines.

use std::{
    convert::Infallible,
    fmt::Write,
    io,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rustix::{
    io::Errno,
    time::{
        Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
        timerfd_settime,
    },
};
use tokio::{io::Interest, sync::watch, time::Instant};

use crate::{faults, readiness};

const SECOND_NS: i64 = 1_000_000_000;
const DAY_S: i64 = 86_400;

/// The moment when `limit` will be over; now, when that is too far away to be told.
#[must_use]
pub fn after(limit: Duration) -> Instant {
    let now = Instant::now();
    now.checked_add(limit).unwrap_or(now)
}

/// Unix time in nanoseconds; 0 before 1970.
#[must_use]
pub fn now_ns() -> i64 {
    let now_ns = match SystemTime::now().duration_since(UNIX_EPOCH) {
        Ok(since) => i64::try_from(since.as_nanos()).unwrap_or(i64::MAX),
        Err(_) => 0,
    };
    now_ns.saturating_add(faults::clock_ns())
}

/// Hears of each time that the wall clock is set, as a time server sets it after a wrong start or a
/// suspension of the host. Clones hear of it too.
#[derive(Debug, Clone)]
pub struct Steps(watch::Receiver<()>);

impl Steps {
    /// Begins to listen, in a task that ends when nobody does any more. A failure is logged: then nobody
    /// hears of anything.
    #[must_use]
    pub fn watch() -> Self {
        let (sender, receiver) = watch::channel(());
        tokio::spawn(async move {
            tokio::select! {
                Err(error) = tell(&sender) => tracing::warn!(%error, "watch the wall clock"),
                () = sender.closed() => {}
            }
        });
        Self(receiver)
    }

    /// Waits until the clock is set, or was since the last call.
    pub async fn next(&mut self) {
        if self.0.changed().await.is_err() {
            // The task has said why.
            std::future::pending().await
        }
    }
}

/// Tells `sender` of each time that the clock is set, until that fails: a timer that never expires is
/// cancelled then (timerfd_create(2), `TFD_TIMER_CANCEL_ON_SET`).
async fn tell(sender: &watch::Sender<()>) -> io::Result<Infallible> {
    let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
    let timer = timerfd_create(TimerfdClockId::Realtime, flags)?;
    let timer = readiness::register(timer, Interest::READABLE)?;
    let zero = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let never = Itimerspec {
        it_interval: zero,
        it_value: Timespec {
            tv_sec: i64::MAX,
            ..zero
        },
    };
    let flags = TimerfdTimerFlags::ABSTIME | TimerfdTimerFlags::CANCEL_ON_SET;
    loop {
        match timerfd_settime(timer.get_ref(), flags, &never) {
            // It is set all the same, and the clock was too.
            Err(Errno::CANCELED) => {
                let _ = sender.send(());
            }
            result => {
                result?;
            }
        }
        let mut ready = timer.readable().await?;
        let read = ready.try_io(|timer| Ok(rustix::io::read(timer, &mut [0; 8])?));
        match read {
            Ok(Err(error)) if error.raw_os_error() == Some(Errno::CANCELED.raw_os_error()) => {
                let _ = sender.send(());
            }
            Ok(Err(error)) => return Err(error),
            // Not ready after all.
            Ok(Ok(_)) | Err(_) => {}
        }
    }
}

/// Appends a time as RFC 3339 in UTC with nanoseconds, as in CRI log files.
pub fn write_rfc3339(at_ns: i64, out: &mut String) {
    let seconds = at_ns.div_euclid(SECOND_NS);
    let nanos = at_ns.rem_euclid(SECOND_NS);
    let (year, month, day) = date(seconds.div_euclid(DAY_S));
    let time = seconds.rem_euclid(DAY_S);
    let (hour, minute, second) = (time / 3600, time / 60 % 60, time % 60);
    // Writing to a String cannot fail.
    let _ = write!(
        out,
        "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{nanos:09}Z"
    );
}

/// The Gregorian date of a day counted from 1970-01-01.
///
/// Years are counted from March, so that the leap day is the last of a year; 146 097 days are
/// one cycle of 400 years, and day 0 of the count used here is 0000-03-01.
fn date(day: i64) -> (i64, i64, i64) {
    const CYCLE: i64 = 146_097;
    const EPOCH: i64 = 719_468;
    let shifted = day + EPOCH;
    let cycle = shifted.div_euclid(CYCLE);
    let in_cycle = shifted.rem_euclid(CYCLE);
    let year_of_cycle =
        (in_cycle - in_cycle / 1460 + in_cycle / 36_524 - in_cycle / (CYCLE - 1)) / 365;
    let day_of_year = in_cycle - (365 * year_of_cycle + year_of_cycle / 4 - year_of_cycle / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 {
        from_march + 3
    } else {
        from_march - 9
    };
    let year = cycle * 400 + year_of_cycle + i64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(at_ns: i64) -> String {
        let mut out = String::new();
        write_rfc3339(at_ns, &mut out);
        out
    }

    #[test]
    fn times_are_written_as_others_write_them() {
        assert_eq!(text(0), "1970-01-01T00:00:00.000000000Z");
        // From `date -u -d @… +%FT%T`.
        assert_eq!(
            text(951_782_400 * SECOND_NS + 5),
            "2000-02-29T00:00:00.000000005Z"
        );
        assert_eq!(
            text(1_735_689_599 * SECOND_NS + 999_999_999),
            "2024-12-31T23:59:59.999999999Z"
        );
        assert_eq!(
            text(4_107_542_400 * SECOND_NS),
            "2100-03-01T00:00:00.000000000Z"
        );
    }

    #[test]
    fn every_day_follows_the_one_before() {
        let mut last = date(-1);
        for day in 0..60_000 {
            let this = date(day);
            assert!(this > last, "{last:?} {this:?}");
            assert!((1..=31).contains(&this.2) && (1..=12).contains(&this.1));
            last = this;
        }
    }
}
