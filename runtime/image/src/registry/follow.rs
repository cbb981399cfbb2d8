//! One request to its answer, over redirects. The client follows none by itself: at each step it
//! is decided here whether that address may be gone to, and what it is shown.
//!
//! | another origin than the first | |
//! |---|---|
//! | credentials and configured headers | are never sent, also not to the first one later on |
//! | http after https | only where `hosts.toml` names the origin so |
//! | an address that the registry's kind may not lead to (`zone`) | only where `hosts.toml` names it |
//! | its text | is not quoted |

use reqwest::header::LOCATION;
use reqwest::{RequestBuilder, Response, StatusCode};
use tokio::time::timeout;

use crate::error::PullError;

use super::endpoint::{Endpoint, origin};
use super::servers::{Servers, Way};
use super::zone::Zone;

/// Most redirects on the way to one answer.
const MAX_REDIRECTS: usize = 5;

/// What a request came to.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) response: Response,
    /// Nobody else was asked than the first origin.
    pub(super) own: bool,
    /// The origin that answered, for messages.
    pub(super) from: String,
}

/// Sends a request where `way` says and then where the answers lead. `request` makes it; its
/// last argument is whether it may carry what is for the first origin alone.
pub(super) async fn follow(
    servers: &Servers,
    endpoint: &Endpoint,
    what: &str,
    mut way: Way,
    zone: Option<Zone>,
    request: impl Fn(&Way, bool) -> RequestBuilder,
) -> Result<Answer, PullError> {
    let (first, mut zone) = (way.url.origin(), zone);
    let mut own = true;
    for _ in 0..=MAX_REDIRECTS {
        let response = timeout(servers.no_progress, request(&way, own).send())
            .await
            .map_err(|_| endpoint.too_slow(what, servers.no_progress))?
            .map_err(|e| endpoint.failed(what, &e))?;
        let location = match response.headers().get(LOCATION) {
            Some(location) if is_redirect(response.status()) => location,
            _ => {
                return Ok(Answer {
                    response,
                    own,
                    from: origin(&way.url),
                });
            }
        };
        let here = *zone.get_or_insert_with(|| endpoint.zone(&response));
        let next = location
            .to_str()
            .ok()
            .and_then(|text| way.url.join(text).ok());
        let next = next.ok_or_else(|| endpoint.misled("an address that is none".into()))?;
        own &= next.origin() == first;
        way = servers.way(endpoint, here, Some(&way.url), next)?;
    }
    Err(endpoint.misled("one address after the other".into()))
}

fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}
