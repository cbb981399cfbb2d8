//! `hull cp`: files between here and a container, as one archive through a `tar` that runs in the container.
//!
//! Read in this order: [`place`] (what is named), [`outward`] and [`inward`] (what goes where), [`remote`] (who makes
//! and takes archives there), [`unpack`] (an archive that a hostile container made) and [`pack`], [`pipe`] (bytes
//! between a thread and a session).

mod inward;
mod outward;
mod pack;
mod pipe;
mod place;
mod remote;
mod unpack;

use anyhow::{Result, bail};

use self::{
    place::Place,
    remote::{Links, Tar},
};
use super::{find, streams::Streams};
use crate::client::Client;

/// What `hull cp` is asked for.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct CpArgs {
    /// CONTAINER:PATH, a path here, or - for an archive from standard input. PATH/. means what is in it
    source: Place,
    /// CONTAINER:PATH, a path here, or - for an archive to standard output
    target: Place,
    /// Copy what links at the source lead to, in place of the links
    #[arg(short = 'L', long)]
    follow_link: bool,
}

/// Copies.
pub(super) async fn cp(client: &Client, streams: &Streams, arguments: &CpArgs) -> Result<()> {
    let links = if arguments.follow_link {
        Links::Followed
    } else {
        Links::Kept
    };
    match (&arguments.source, &arguments.target) {
        (Place::In { container, path }, target @ (Place::Here(_) | Place::Standard)) => {
            let id = find::one(client, container).await?.container.id;
            let tar = Tar { streams, id: &id };
            outward::copy(&tar, path, target, links).await
        }
        (source @ (Place::Here(_) | Place::Standard), Place::In { container, path }) => {
            let id = find::one(client, container).await?.container.id;
            let tar = Tar { streams, id: &id };
            inward::copy(&tar, source, path, links).await
        }
        (Place::In { .. }, Place::In { .. }) => {
            bail!("both are in containers: copy through `hull cp SOURCE - | hull cp - TARGET`")
        }
        _ => bail!("neither is in a container: one must be CONTAINER:PATH"),
    }
}
