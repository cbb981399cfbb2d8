//! `hull images`: the node's images, for a person.
//!
//! [`service`] is the daemon's side, the rest is the client's: [`progress`] shows how far a pull
//! is, [`transfer`] moves archives, [`table`] prints lists.

mod credentials;
pub(crate) mod login;
pub(crate) mod progress;
pub(crate) mod service;
mod table;
#[cfg(test)]
mod tests;
mod transfer;

use std::{
    io::{self, Read},
    path::PathBuf,
};

use anyhow::{Context, Result};
use hull_proto_images::v1::{Image, ListRequest, PullRequest, RemoveRequest};

pub(crate) use self::credentials::complete;
use self::{progress::Show, table::Names};
use crate::{
    client::{self, Client, refused},
    config::Settings,
    table::{Format, Output, json, lines, print},
};

/// Longest password or token read, bytes.
const LONGEST_SECRET: u64 = 64 << 10;

/// What `hull images` is asked for.
#[derive(Debug, Clone, clap::Subcommand)]
pub(crate) enum ImagesCommand {
    /// List images
    List {
        /// With those that are removed and still used by containers
        #[arg(short, long)]
        all: bool,
        #[command(flatten)]
        output: Output,
        /// Ids only
        #[arg(short, long, conflicts_with = "output")]
        quiet: bool,
        /// Names with the digest at the registry, in place of those with a tag
        #[arg(long, conflicts_with_all = ["output", "quiet"])]
        digests: bool,
    },
    /// Pull an image and print its id
    Pull(PullArgs),
    /// Remove images, each with all its names; containers go on using what they use
    Rm {
        /// Names or ids
        #[arg(required = true, value_name = "IMAGE")]
        images: Vec<String>,
    },
    /// Take in the images of an archive (OCI layout, or what `docker save` writes); print their ids
    Import {
        /// The archive, plain or compressed; - is standard input
        file: PathBuf,
        /// Name for an image that the archive does not name, or is to be named otherwise
        #[arg(long)]
        name: Option<String>,
        /// Print the ids only
        #[arg(short, long)]
        quiet: bool,
    },
    /// Write images into one OCI archive, which `docker load` can read too
    Export {
        /// Names or ids
        #[arg(required = true, value_name = "IMAGE")]
        images: Vec<String>,
        /// The archive; - is standard output
        #[arg(short, long, value_name = "FILE")]
        output: PathBuf,
    },
}

/// What is to be pulled.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct PullArgs {
    /// Image name
    image: String,
    #[command(flatten)]
    credentials: Credentials,
    /// Print the id only
    #[arg(short, long)]
    quiet: bool,
}

/// Who pulls. A secret is read from standard input: arguments are seen by everybody on the node.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct Credentials {
    /// User at the registry; needs --password-stdin
    #[arg(short, long, value_name = "NAME", requires = "password_stdin")]
    user: Option<String>,
    /// Read the user's password from standard input
    #[arg(long, group = "secret", requires = "user")]
    password_stdin: bool,
    /// Read a token from standard input that the registry's token server takes for access tokens
    #[arg(long, group = "secret", conflicts_with = "user")]
    identity_token_stdin: bool,
    /// Read a bearer token from standard input that is sent as it is
    #[arg(long, group = "secret", conflicts_with = "user")]
    registry_token_stdin: bool,
}

impl Credentials {
    /// The request with what `input` has of the secret.
    fn request(self, image: String, input: impl Read) -> Result<PullRequest> {
        let mut request = PullRequest {
            image,
            username: self.user.unwrap_or_default(),
            ..PullRequest::default()
        };
        if self.password_stdin {
            request.password = secret(input)?;
        } else if self.identity_token_stdin {
            request.identity_token = secret(input)?;
        } else if self.registry_token_stdin {
            request.registry_token = secret(input)?;
        } else {
            complete(&mut request);
        }
        Ok(request)
    }
}

/// Does what is asked. Ctrl-C ends it, and leaves nothing half done.
pub(crate) async fn run(settings: Settings, command: ImagesCommand) -> Result<()> {
    let daemon = client::connect(settings).await?;
    let result = tokio::select! {
        result = execute(daemon.client(), command) => result,
        _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted")),
    };
    daemon.close().await;
    result
}

async fn execute(client: Client, command: ImagesCommand) -> Result<()> {
    match command {
        ImagesCommand::List {
            all,
            output,
            quiet,
            digests,
        } => {
            let images = list(&client, all).await?;
            print(&match output.format {
                Format::Json => json(images.iter().map(table::json)),
                Format::Table if quiet => lines(images.into_iter().map(|image| image.id)),
                Format::Table => {
                    table::text(&images, if digests { Names::Digests } else { Names::Tags })
                }
            })
        }
        ImagesCommand::Pull(asked) => {
            let request = asked.credentials.request(asked.image, io::stdin())?;
            let id = progress::pull(&client, request, Show::unless(asked.quiet)).await?;
            print(&lines([id]))
        }
        ImagesCommand::Rm { images } => {
            for image in images {
                let containers = remove(&client, image.clone()).await?;
                if containers > 0 {
                    eprintln!(
                        "hull: {image} is removed; {containers} container(s) use it still, \
                         and its files go with the last of them"
                    );
                }
            }
            Ok(())
        }
        ImagesCommand::Import { file, name, quiet } => {
            let name = name.unwrap_or_default();
            let ids = transfer::import(&client, &file, name, Show::unless(quiet)).await?;
            print(&lines(ids))
        }
        ImagesCommand::Export { images, output } => {
            transfer::export(&client, images, &output).await
        }
    }
}

fn secret(input: impl Read) -> Result<String> {
    let mut text = String::new();
    input
        .take(LONGEST_SECRET)
        .read_to_string(&mut text)
        .context("read the password or token")?;
    Ok(text.trim_end_matches(['\r', '\n']).to_owned())
}

/// Lists the images; `all`: also those that are removed and still used.
async fn list(client: &Client, all: bool) -> Result<Vec<Image>> {
    let answer = client.images.clone().list(ListRequest { all }).await;
    let mut answer = answer.map_err(refused("list images"))?.into_inner();
    let mut images = Vec::new();
    while let Some(image) = answer.message().await.map_err(refused("list images"))? {
        images.push(image);
    }
    Ok(images)
}

/// Returns how many containers use the image still.
async fn remove(client: &Client, image: String) -> Result<u64> {
    let answer = client.images.clone().remove(RemoveRequest { image }).await;
    let removed = answer.map_err(refused("remove the image"))?.into_inner();
    Ok(removed.containers)
}
