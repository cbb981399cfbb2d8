//! Reads and writes files and measures how fast, for the benchmark.
//!
//! ```text
//! hull-diskload STEP...    one line `NAME FIGURE` for each step, in their order
//!
//! NAME=read:FILE           all of it in order, MB/s (10^6 bytes)
//! NAME=random:FILE:COUNT   so many blocks of 4 KiB anywhere in it, per second
//! NAME=walk:DIRECTORY      finds and reads all files below it, files per second
//! NAME=stat:DIRECTORY      lists it and asks for the attributes of each file in it, files per second
//! NAME=create:DIRECTORY:COUNT  makes it with so many files of 1 KiB, files per second
//! NAME=unlink:DIRECTORY    removes it and the files in it, files per second
//! NAME=write:FILE:MIB      writes it in order and syncs it once, MB/s
//! NAME=sync:FILE:COUNT     writes so many blocks of 4 KiB and syncs each, per second
//! NAME=forget:FILE         drops the file's pages from this kernel's cache; has no figure
//! ```
//!
//! What is in which cache before a step is the caller's affair.

#![forbid(unsafe_code)]

use std::{
    env,
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::ExitCode,
    str::FromStr,
    time::{Duration, Instant},
};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use walkdir::WalkDir;

/// How much is read or written at once, bytes.
const BLOCK: usize = 128 << 10;
/// A small block, bytes.
const SMALL: usize = 4 << 10;

/// A file of a directory, bytes.
const FILE: usize = 1 << 10;

/// What is measured, and what the figure is called.
#[derive(Debug, PartialEq)]
struct Step {
    name: String,
    kind: Kind,
    path: PathBuf,
}

#[derive(Debug, PartialEq)]
enum Kind {
    Read,
    Random { blocks: u64 },
    Walk,
    Stat,
    Create { files: u64 },
    Unlink,
    Write { mib: u64 },
    Sync { blocks: u64 },
    Forget,
}

impl FromStr for Step {
    type Err = io::Error;

    fn from_str(text: &str) -> io::Result<Self> {
        let wrong = || {
            io::Error::other(format!(
                "{text}: not NAME=KIND:PATH or NAME=KIND:PATH:COUNT"
            ))
        };
        let (name, rest) = text.split_once('=').ok_or_else(wrong)?;
        let (kind, rest) = rest.split_once(':').ok_or_else(wrong)?;
        let counted = |of: fn(u64) -> Kind| {
            let (path, count) = rest.rsplit_once(':').ok_or_else(wrong)?;
            let count = count.parse().ok().filter(|count| *count > 0);
            Ok::<_, io::Error>((of(count.ok_or_else(wrong)?), path))
        };
        let (kind, path) = match kind {
            "read" => (Kind::Read, rest),
            "random" => counted(|blocks| Kind::Random { blocks })?,
            "walk" => (Kind::Walk, rest),
            "stat" => (Kind::Stat, rest),
            "create" => counted(|files| Kind::Create { files })?,
            "unlink" => (Kind::Unlink, rest),
            "write" => counted(|mib| Kind::Write { mib })?,
            "sync" => counted(|blocks| Kind::Sync { blocks })?,
            "forget" => (Kind::Forget, rest),
            _ => return Err(wrong()),
        };
        Ok(Self {
            name: name.into(),
            kind,
            path: path.into(),
        })
    }
}

fn main() -> ExitCode {
    for step in env::args().skip(1) {
        let result = step.parse().and_then(|step: Step| {
            if let Some(figure) = step.run()? {
                writeln!(io::stdout(), "{} {figure:.2}", step.name)?;
            }
            Ok(())
        });
        if let Err(error) = result {
            eprintln!("hull-diskload: {step}: {error}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

impl Step {
    fn run(&self) -> io::Result<Option<f64>> {
        let begin = Instant::now();
        let amount = match self.kind {
            Kind::Read => megabytes(read(&self.path, &mut [0; BLOCK])?),
            Kind::Random { blocks } => random(&self.path, blocks)?,
            Kind::Walk => walk(&self.path)?,
            Kind::Stat => stat(&self.path)?,
            Kind::Create { files } => create(&self.path, files)?,
            Kind::Unlink => unlink(&self.path)?,
            Kind::Write { mib } => megabytes(write(&self.path, mib << 20)?),
            Kind::Sync { blocks } => sync(&self.path, blocks)?,
            Kind::Forget => {
                forget(&self.path)?;
                return Ok(None);
            }
        };
        rate(amount, begin.elapsed()).map(Some)
    }
}

fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

/// A figure of nothing would look like one of something slow.
fn rate(amount: f64, taken: Duration) -> io::Result<f64> {
    if amount > 0.0 {
        Ok(amount / taken.as_secs_f64().max(1e-9))
    } else {
        Err(io::Error::other("there is nothing to measure"))
    }
}

/// The number of bytes that were there.
fn read(path: &Path, block: &mut [u8]) -> io::Result<u64> {
    let (mut file, mut total) = (File::open(path)?, 0);
    loop {
        match file.read(block)? {
            0 => return Ok(total),
            count => total += count as u64,
        }
    }
}

/// The same places each time, so that one run can be compared with the next.
fn random(path: &Path, blocks: u64) -> io::Result<f64> {
    let file = File::open(path)?;
    let there = file.metadata()?.len() / SMALL as u64;
    if there == 0 {
        return Err(io::Error::other("smaller than a block"));
    }
    let (mut places, mut block) = (fastrand::Rng::with_seed(1), [0; SMALL]);
    for _ in 0..blocks {
        file.read_exact_at(&mut block, places.u64(..there) * SMALL as u64)?;
    }
    Ok(blocks as f64)
}

/// The number of files.
fn walk(directory: &Path) -> io::Result<f64> {
    let (mut files, mut block) = (0_u32, [0; BLOCK]);
    for entry in WalkDir::new(directory) {
        let entry = entry?;
        if entry.file_type().is_file() {
            read(entry.path(), &mut block)?;
            files += 1;
        }
    }
    Ok(f64::from(files))
}

/// The number of files.
fn stat(directory: &Path) -> io::Result<f64> {
    let mut files = 0_u32;
    for entry in fs::read_dir(directory)? {
        if entry?.metadata()?.is_file() {
            files += 1;
        }
    }
    Ok(f64::from(files))
}

fn create(directory: &Path, files: u64) -> io::Result<f64> {
    fs::create_dir(directory)?;
    for number in 0..files {
        let mut file = File::create_new(directory.join(number.to_string()))?;
        file.write_all(&[number as u8; FILE])?;
    }
    Ok(files as f64)
}

/// The number of files.
fn unlink(directory: &Path) -> io::Result<f64> {
    let mut files = 0_u32;
    for entry in fs::read_dir(directory)? {
        fs::remove_file(entry?.path())?;
        files += 1;
    }
    fs::remove_dir(directory)?;
    Ok(f64::from(files))
}

/// Random bytes, so that nothing below can leave them out.
fn write(path: &Path, bytes: u64) -> io::Result<u64> {
    let mut block = [0; BLOCK];
    fastrand::Rng::with_seed(2).fill(&mut block);
    let mut file = File::create(path)?;
    for _ in 0..bytes / BLOCK as u64 {
        file.write_all(&block)?;
    }
    file.sync_all()?;
    Ok(bytes)
}

fn sync(path: &Path, blocks: u64) -> io::Result<f64> {
    let mut file = File::create(path)?;
    for number in 0..blocks {
        file.write_all(&[number as u8; SMALL])?;
        file.sync_all()?;
    }
    Ok(blocks as f64)
}

fn forget(path: &Path) -> io::Result<()> {
    let file = File::open(path)?;
    // Dirty pages would stay.
    file.sync_all()?;
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_measured() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("a:b");
        for kind in [
            "write:PATH:2",
            "forget:PATH",
            "read:PATH",
            "random:PATH:7",
            "sync:PATH:3",
        ] {
            let step = format!("x={}", kind.replace("PATH", file.to_str().unwrap()));
            let figure = step.parse::<Step>().unwrap().run().unwrap();
            assert_eq!(figure.is_some(), !kind.starts_with("forget"), "{kind}");
            assert!(figure.is_none_or(|figure| figure > 0.0), "{kind}");
            if kind.starts_with("write") {
                assert_eq!(file.metadata().unwrap().len(), 2 << 20);
            }
        }
        assert_eq!(file.metadata().unwrap().len(), 3 * SMALL as u64);
        assert_eq!(walk(directory.path()).unwrap(), 1.0);
    }

    #[test]
    fn files_are_made_counted_and_removed() {
        let directory = tempfile::tempdir().unwrap();
        let many = directory.path().join("many");
        assert_eq!(create(&many, 7).unwrap(), 7.0);
        assert!(create(&many, 7).is_err(), "it is there");
        assert_eq!(fs::metadata(many.join("6")).unwrap().len(), FILE as u64);
        assert_eq!(stat(&many).unwrap(), 7.0);
        assert_eq!(unlink(&many).unwrap(), 7.0);
        assert!(!many.exists());
    }

    #[test]
    fn nothing_has_no_figure() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        File::create(path.join("empty")).unwrap();
        for (kind, path) in [
            ("read", path.join("empty")),
            ("random", path.join("empty:1")),
            ("read", path.join("missing")),
            ("walk", path.join("missing")),
            ("stat", path.join("missing")),
            ("unlink", path.join("missing")),
        ] {
            let step = format!("x={kind}:{}", path.display());
            let step: Step = step.parse().unwrap();
            assert!(step.run().is_err(), "{step:?}");
        }
    }

    #[test]
    fn wrong_steps_are_refused() {
        for step in [
            "",
            "x",
            "x=read",
            "x=mend:/a",
            "x=write:/a",
            "x=sync:/a:0",
            "x=create:/a",
            "x=random:/a:b",
        ] {
            assert!(step.parse::<Step>().is_err(), "{step}");
        }
    }
}
