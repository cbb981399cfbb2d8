//! `reference DIR`: writes what is made of the command line and the keys of the configuration: manual pages,
//! completions for shells, the default configuration, and the versions of what a daemon leaves to the next.

use std::{
    error::Error,
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
};

use clap_complete::Shell;
use clap_mangen::Man;
use hull::reference::{EXIT_CODES, FORMATS, command, default_file};

const FILES: [(&str, &str); 5] = [
    (
        "/etc/hull/config.toml, /etc/hull/config.d/*.toml",
        "Configuration; see hull config.",
    ),
    ("/etc/hull/certs.d", "Registries, in containerd's form."),
    ("/etc/cni/net.d", "The pods' network."),
    ("/run/hull/hull.sock", "The CRI socket."),
    ("/var/lib/hull", "Images, records and disks of pods."),
];

fn main() -> Result<(), Box<dyn Error>> {
    let directory = std::env::args_os().nth(1).map(PathBuf::from);
    let directory = directory.ok_or("usage: reference DIR")?;
    pages(&directory.join("man"))?;
    let completions = directory.join("completions");
    fs::create_dir_all(&completions)?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        clap_complete::generate_to(shell, &mut command(), "hull", &completions)?;
    }
    fs::write(directory.join("config.toml"), default_file())?;
    let formats = FORMATS.map(|(name, version)| format!("{name} {version}\n"));
    fs::write(directory.join("formats"), formats.concat())?;
    Ok(())
}

/// One for each command, and in the first what concerns all of them.
fn pages(directory: &Path) -> Result<(), Box<dyn Error>> {
    fs::create_dir_all(directory)?;
    // `hull help` has no page of its own.
    let command = command().disable_help_subcommand(true);
    clap_mangen::generate_to(command.clone(), directory)?;
    let mut page = File::create(directory.join("hull.1"))?;
    Man::new(command).render(&mut page)?;
    writeln!(page, ".SH \"EXIT STATUS\"")?;
    for (code, what) in EXIT_CODES {
        writeln!(page, ".TP\n\\fB{code}\\fR\n{what}")?;
    }
    writeln!(page, ".SH FILES")?;
    for (file, what) in FILES {
        writeln!(page, ".TP\n\\fI{file}\\fR\n{what}")?;
    }
    Ok(())
}
