//! What is asked for on the command line.

use anyhow::{Result, bail};

use super::values::{self, Bytes, Port, User, Variable};
use crate::containers::Volume;
use crate::trailing;

/// What `hull run` is asked for.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(override_usage = "hull run [OPTIONS] IMAGE [--] [COMMAND]...")]
pub(crate) struct RunArgs {
    /// Image name; then the command with its arguments, in place of the image's
    #[arg(required = true, num_args = 1.., trailing_var_arg = true, allow_hyphen_values = true, value_name = "IMAGE")]
    pub(super) words: Vec<String>,
    /// Pass standard input on, as is done without it when that is a pipe or file
    #[arg(short, long)]
    pub(super) interactive: bool,
    /// Give the container a terminal; Ctrl-P Ctrl-Q leaves it
    #[arg(short, long)]
    pub(super) tty: bool,
    /// Print the container's id and leave it to the daemon, until `hull rm`
    #[arg(short, long)]
    pub(super) detach: bool,
    /// Remove it when it has ended; that is so without -d
    #[arg(long)]
    pub(super) rm: bool,
    /// Name to ask for it by
    #[arg(long, value_parser = values::name)]
    pub(super) name: Option<String>,
    /// Set an environment variable; may be repeated
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub(super) env: Vec<Variable>,
    /// Mount a path of the host; may be repeated
    #[arg(short, long, value_name = "HOST:CONTAINER[:ro]")]
    pub(super) volume: Vec<Volume>,
    /// Lead a port of the host to the container, by a CNI plugin with portMappings; may be repeated
    #[arg(short, long, value_name = "[IP:]HOST:CONTAINER[/udp]")]
    pub(super) publish: Vec<Port>,
    /// Working directory
    #[arg(short, long, value_name = "DIR")]
    pub(super) workdir: Option<String>,
    /// User of the image, or a number
    #[arg(short, long, value_name = "USER[:GID]")]
    pub(super) user: Option<User>,
    /// Memory limit: bytes, or with K, M or G
    #[arg(short, long, value_name = "SIZE")]
    pub(super) memory: Option<Bytes>,
    /// CPU limit, e.g. 0.5
    #[arg(long, value_name = "NUMBER", value_parser = values::cpus)]
    pub(super) cpus: Option<f64>,
    /// Program in place of the image's entry point; empty: none
    #[arg(long, value_name = "PROGRAM")]
    pub(super) entrypoint: Option<String>,
    /// Make the container's root read-only
    #[arg(long)]
    pub(super) read_only: bool,
    /// All capabilities and devices of the guest
    #[arg(long)]
    pub(super) privileged: bool,
    /// Runtime handler
    #[arg(long, alias = "handler", value_name = "NAME", default_value = "")]
    pub(super) runtime: String,
    /// Say nothing but what the container says
    #[arg(short, long)]
    pub(super) quiet: bool,
}

impl RunArgs {
    /// The image's name.
    pub(crate) fn image(&self) -> &str {
        trailing::split(&self.words).0
    }

    /// The command in place of the image's.
    pub(crate) fn command(&self) -> &[String] {
        trailing::split(&self.words).1
    }

    /// Refuses what can't be.
    pub(super) fn check(&self) -> Result<()> {
        trailing::check(&self.words)?;
        if self.detach && self.rm {
            bail!("--rm can't be had with -d: nobody waits for its end; `hull rm` removes it");
        }
        for volume in &self.volume {
            if !volume.host.exists() {
                bail!("{} is not there to be mounted", volume.host.display());
            }
        }
        Ok(())
    }
}
