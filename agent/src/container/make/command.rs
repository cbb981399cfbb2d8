//! The command of a process and its environment.

use std::{
    ffi::{CString, OsStr},
    io,
    os::unix::ffi::OsStrExt,
    path::Path,
};

use nix::errno::Errno;

use super::error::StepError;

/// A command that can be executed.
#[derive(Debug)]
pub(super) struct Command {
    args: Vec<CString>,
    env: Vec<CString>,
    /// Where it may be, in this order.
    candidates: Vec<CString>,
}

impl Command {
    /// What `args` name, to be looked for in the `PATH` of `env` as execvp(3) does.
    pub(super) fn new(args: &[String], env: &[String]) -> Result<Self, StepError> {
        let texts = |what: &str, texts: &[String]| {
            let strings = texts.iter().map(|text| CString::new(text.as_bytes()));
            strings
                .collect::<Result<Vec<_>, _>>()
                .map_err(|_| StepError::Refused(format!("{what} holds a zero byte")))
        };
        let (args, env) = (texts("an argument", args)?, texts("the environment", env)?);
        let name = args.first();
        let name = name.ok_or_else(|| StepError::Refused("no command".to_owned()))?;
        // An empty name is one that is found nowhere, as for execvp(3).
        let candidates = if name.is_empty() {
            Vec::new()
        } else if name.as_bytes().contains(&b'/') {
            vec![name.clone()]
        } else {
            let path = env
                .iter()
                .find_map(|entry| entry.as_bytes().strip_prefix(b"PATH="));
            let dirs = path.unwrap_or_default().split(|byte| *byte == b':');
            let within = dirs.filter(|dir| !dir.is_empty()).map(|dir| {
                let file =
                    Path::new(OsStr::from_bytes(dir)).join(OsStr::from_bytes(name.as_bytes()));
                CString::new(file.into_os_string().into_encoded_bytes())
            });
            within.flatten().collect()
        };
        Ok(Self {
            args,
            env,
            candidates,
        })
    }

    /// Becomes the command; returns why that could not be.
    pub(super) fn execute(&self) -> StepError {
        let mut failure = Errno::ENOENT;
        for file in &self.candidates {
            let Err(error) = nix::unistd::execve(file, &self.args, &self.env);
            match error {
                Errno::ENOENT | Errno::ENOTDIR => {}
                // Another directory may have one that can be executed.
                Errno::EACCES => failure = error,
                _ => {
                    failure = error;
                    break;
                }
            }
        }
        let name = self
            .args
            .first()
            .map(|name| name.to_string_lossy().into_owned());
        let name: String = name.unwrap_or_default().chars().take(200).collect();
        let step = match name.as_str() {
            "" => "exec \"\"".to_owned(),
            name => format!("exec {name}"),
        };
        StepError::System {
            step,
            source: io::Error::from(failure),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidates(name: &str, env: &[&str]) -> Vec<String> {
        let env: Vec<String> = env.iter().map(|e| (*e).to_owned()).collect();
        let command = Command::new(&[name.to_owned()], &env).unwrap();
        command
            .candidates
            .iter()
            .map(|c| c.to_str().unwrap().to_owned())
            .collect()
    }

    #[test]
    fn a_name_is_looked_for_in_the_path_of_the_container() {
        let env = ["A=b", "PATH=/bin::/usr/bin:rel"];
        assert_eq!(candidates("sh", &env), ["/bin/sh", "/usr/bin/sh", "rel/sh"]);
        assert_eq!(candidates("./sh", &env), ["./sh"]);
        assert_eq!(candidates("sh", &[]), [""; 0]);
    }

    #[test]
    fn what_can_not_be_a_command_is_refused() {
        assert!(Command::new(&[], &[]).is_err());
        assert!(Command::new(&["a\0b".to_owned()], &[]).is_err());
        assert!(Command::new(&["a".to_owned()], &["b=\0".to_owned()]).is_err());
    }

    #[test]
    fn why_it_was_not_executed_is_told() {
        let failure = |name: &str| {
            let path = vec!["PATH=/nonexistent:/etc".to_owned()];
            Command::new(&[name.to_owned()], &path).unwrap().execute()
        };
        let missing = failure("hull-none");
        assert_eq!(
            (missing.to_string().as_str(), missing.errno()),
            ("exec hull-none", libc::ENOENT)
        );
        let nameless = failure("");
        assert_eq!(
            (nameless.to_string().as_str(), nameless.errno()),
            ("exec \"\"", libc::ENOENT)
        );
        let denied = failure("passwd");
        assert_eq!(
            (denied.to_string().as_str(), denied.errno()),
            ("exec passwd", libc::EACCES)
        );
        assert_eq!(failure("/nonexistent/x").to_string(), "exec /nonexistent/x");
    }
}
