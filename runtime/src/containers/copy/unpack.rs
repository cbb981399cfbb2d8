//! An archive that a container made. It is not trusted: nothing is written but below one directory, no link is
//! followed on the way, and none is made that leads out of it.
//!
//! Why that holds: each directory of a path is a real one, so its depth is that of the path. A link is made only
//! if it is relative, goes up at its beginning alone, and no further than its directory is deep; so whatever
//! links lead to each other, none of them gets above the root. A hard link to a link would be one of another
//! depth, and is refused. Modes lose setuid and setgid, and owners are who copies.

use std::{
    fs::{File, Permissions},
    io::{self, Read},
    os::unix::fs::PermissionsExt,
    path::{Component, Path, PathBuf},
    time::{Duration, UNIX_EPOCH},
};

use anyhow::{Context, Result, bail};
use hull_base::printable::one_line;
use nix::errno::Errno;
use pathrs::{
    InodeType, Root,
    error::{Error, ErrorKind},
    flags::{OpenFlags, ResolverFlags},
};
use tar::{Archive, Entry, EntryType};

/// Most characters of a name in a message.
const SHOWN: usize = 200;
/// Most things that are told to be left out.
const TOLD: usize = 20;

/// What the first thing of the archive has to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Any,
    Directory,
    /// Anything but a directory.
    File,
}

/// Where an archive goes.
pub(super) struct Unpack {
    root: Root,
    /// What all paths of the archive begin with; none: with nothing.
    from: Option<PathBuf>,
    /// What stands in its place.
    to: PathBuf,
    first: Kind,
    left_out: Vec<String>,
}

impl Unpack {
    /// Below a directory that is there.
    pub(super) fn new(
        directory: &Path,
        from: Option<PathBuf>,
        to: Option<PathBuf>,
        first: Kind,
    ) -> Result<Self> {
        let root = Root::open(directory);
        let root = root.with_context(|| format!("open {}", directory.display()))?;
        Ok(Self {
            root: root.with_resolver_flags(ResolverFlags::NO_SYMLINKS),
            from,
            to: to.unwrap_or_default(),
            first,
            left_out: Vec::new(),
        })
    }

    /// Writes all of it; returns what was left out.
    pub(super) fn run(mut self, archive: impl Read) -> Result<Vec<String>> {
        let mut archive = Archive::new(archive);
        let mut is_first = true;
        for entry in archive.entries().context("read the archive")? {
            let mut entry = entry.context("read the archive")?;
            let kind = entry.header().entry_type();
            if kind == EntryType::XGlobalHeader {
                continue;
            }
            let named = entry.path().context("read the archive")?.into_owned();
            let path = self.target(&named)?;
            if std::mem::take(&mut is_first) {
                match self.first {
                    Kind::Directory if !kind.is_dir() => bail!("there is no such directory here"),
                    Kind::File if kind.is_dir() => {
                        bail!("the target is no directory, and one is to be copied to it")
                    }
                    _ => {}
                }
            }
            self.write(&mut entry, &path)
                .with_context(|| format!("write {}", shown(&path)))?;
        }
        // What tar fills its last record with: who sends it may have more to say at its end.
        io::copy(&mut archive.into_inner(), &mut io::sink()).context("read the archive")?;
        if is_first {
            bail!("the archive is empty");
        }
        if self.left_out.len() > TOLD {
            let more = self.left_out.len() - TOLD;
            self.left_out.truncate(TOLD);
            self.left_out.push(format!("{more} more"));
        }
        Ok(self.left_out)
    }

    /// The path below the root.
    fn target(&self, named: &Path) -> Result<PathBuf> {
        let mut path = PathBuf::new();
        for component in named.components() {
            match component {
                Component::CurDir => {}
                Component::Normal(name) => path.push(name),
                _ => bail!("the archive has {}, which leads elsewhere", shown(named)),
            }
        }
        let Some(from) = &self.from else {
            return Ok(path);
        };
        match path.strip_prefix(from) {
            // Joined to nothing, it would be a directory.
            Ok(rest) if rest == Path::new("") => Ok(self.to.clone()),
            Ok(rest) => Ok(self.to.join(rest)),
            Err(_) => bail!("the archive has {}, which was not asked for", shown(named)),
        }
    }

    fn write(&mut self, entry: &mut Entry<'_, impl Read>, path: &Path) -> Result<()> {
        if path == Path::new("") {
            return Ok(());
        }
        let mode = entry.header().mode().context("read the archive")? & 0o777;
        let kind = entry.header().entry_type();
        let parent = path.parent().unwrap_or_else(|| Path::new(""));
        if kind.is_dir() {
            // Whoever copies it can write to it while it is filled.
            self.root
                .mkdir_all(path, &Permissions::from_mode(mode | 0o700))?;
            return Ok(());
        }
        let is_file = kind.is_file() || kind.is_gnu_sparse() || kind.is_contiguous();
        if !(is_file || kind.is_symlink() || kind.is_hard_link()) {
            self.left_out
                .push(format!("{} is no file, directory or link", shown(path)));
            return Ok(());
        }
        let linked = entry.link_name().context("read the archive")?;
        let linked = linked.unwrap_or_default().into_owned();
        if kind.is_symlink() && !stays_within(&linked, parent.components().count()) {
            let to = shown(&linked);
            self.left_out
                .push(format!("{} leads elsewhere, to {to}", shown(path)));
            return Ok(());
        }
        if parent != Path::new("") {
            self.root
                .mkdir_all(parent, &Permissions::from_mode(0o755))?;
        }
        let hard_link = match kind.is_hard_link() {
            true => {
                let target = self.target(&linked)?;
                // Fails at a link.
                self.root.resolve(&target)?;
                Some(target)
            }
            false => None,
        };
        if hard_link.as_deref() == Some(path) {
            return Ok(());
        }
        absent_is_fine(self.root.remove_file(path))?;
        if let Some(target) = hard_link {
            self.root.create(path, &InodeType::Hardlink(target))?;
        } else if kind.is_symlink() {
            self.root.create(path, &InodeType::Symlink(linked))?;
        } else {
            let flags = OpenFlags::O_WRONLY | OpenFlags::O_EXCL | OpenFlags::O_NOFOLLOW;
            let mut file = self
                .root
                .create_file(path, flags, &Permissions::from_mode(0o600))?;
            io::copy(entry, &mut file)?;
            finish(&file, mode, entry.header().mtime().unwrap_or(0))?;
        }
        Ok(())
    }
}

/// Gives a file that is written its mode and time.
fn finish(file: &File, mode: u32, seconds: u64) -> io::Result<()> {
    file.set_permissions(Permissions::from_mode(mode))?;
    let time = UNIX_EPOCH.checked_add(Duration::from_secs(seconds));
    match time {
        // One that the file system can't have is left away.
        Some(time) => file.set_modified(time).or(Ok(())),
        None => Ok(()),
    }
}

/// Whether a link in a directory of that depth leads to nothing above the root, as said above.
fn stays_within(link: &Path, depth: usize) -> bool {
    let mut ups = 0;
    let mut went_down = false;
    for component in link.components() {
        match component {
            Component::CurDir => {}
            Component::Normal(_) => went_down = true,
            Component::ParentDir if !went_down => ups += 1,
            _ => return false,
        }
    }
    ups <= depth
}

fn absent_is_fine(removed: Result<(), Error>) -> Result<(), Error> {
    match removed {
        Err(error) if error.kind() == ErrorKind::OsError(Some(Errno::ENOENT as i32)) => Ok(()),
        removed => removed,
    }
}

fn shown(path: &Path) -> String {
    one_line(&path.display().to_string(), SHOWN)
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use tar::{Builder, Header};

    use super::*;

    /// An archive of these: kind, path, and content or what is linked to. Paths are written as they are.
    fn archive(entries: &[(EntryType, &str, &str)]) -> Vec<u8> {
        let mut tar = Builder::new(Vec::new());
        for (kind, path, text) in entries {
            let mut header = Header::new_gnu();
            header.set_entry_type(*kind);
            header.set_mode(0o6755);
            header.set_mtime(1_000_000_000);
            let name = header.as_gnu_mut().unwrap();
            name.name[..path.len()].copy_from_slice(path.as_bytes());
            let content = if kind.is_file() { text.as_bytes() } else { b"" };
            if !kind.is_file() {
                name.linkname[..text.len()].copy_from_slice(text.as_bytes());
            }
            header.set_size(content.len() as u64);
            header.set_cksum();
            tar.append(&header, content).unwrap();
        }
        tar.into_inner().unwrap()
    }

    const FILE: EntryType = EntryType::Regular;
    const DIR: EntryType = EntryType::Directory;
    const LINK: EntryType = EntryType::Symlink;
    const HARD: EntryType = EntryType::Link;

    fn unpack(directory: &Path, entries: &[(EntryType, &str, &str)]) -> Result<Vec<String>> {
        let unpack = Unpack::new(directory, Some("d".into()), Some("new".into()), Kind::Any)?;
        unpack.run(&archive(entries)[..])
    }

    #[test]
    fn files_get_the_name_of_the_target_and_lose_what_gives_power() {
        let directory = tempfile::tempdir().unwrap();
        let at = |path: &str| directory.path().join(path);
        let entries = [
            (DIR, "./d/", ""),
            (FILE, "./d/a", "one"),
            (FILE, "d/deep/b", "two"),
            (LINK, "d/deep/up", "../a"),
            (HARD, "d/hard", "d/a"),
            (EntryType::Fifo, "d/pipe", ""),
            (EntryType::Char, "d/null", ""),
        ];
        let left_out = unpack(directory.path(), &entries).unwrap();
        assert_eq!(left_out.len(), 2, "{left_out:?}");
        assert_eq!(fs::read_to_string(at("new/a")).unwrap(), "one");
        assert_eq!(fs::read_to_string(at("new/deep/up")).unwrap(), "one");
        assert_eq!(fs::read_to_string(at("new/hard")).unwrap(), "one");
        let found = fs::metadata(at("new/a")).unwrap();
        assert_eq!(found.permissions().mode() & 0o7777, 0o755);
        assert_eq!(
            found.modified().unwrap(),
            UNIX_EPOCH + Duration::from_secs(1_000_000_000)
        );
        // Again, over what is there.
        unpack(
            directory.path(),
            &[(FILE, "d/a", "new"), (FILE, "d/deep/up", "file")],
        )
        .unwrap();
        assert_eq!(fs::read_to_string(at("new/a")).unwrap(), "new");
        assert!(!at("new/deep/up").is_symlink());
    }

    #[test]
    fn nothing_is_written_elsewhere() {
        let outer = tempfile::tempdir().unwrap();
        let directory = outer.path().join("target");
        let victim = outer.path().join("victim");
        for entries in [
            &[(FILE, "d/../../victim", "x")][..],
            &[(FILE, "../victim", "x")],
            &[(FILE, "/d/victim", "x")],
            &[(FILE, "other", "x")],
            &[
                (LINK, "d/l", "sub"),
                (DIR, "d/sub", ""),
                (FILE, "d/l/x", "x"),
            ],
            &[(HARD, "d/h", "../victim")],
            &[(HARD, "d/h", "/etc/passwd")],
            &[(LINK, "d/l", "a"), (HARD, "d/h", "d/l")],
        ] {
            fs::create_dir(&directory).unwrap();
            unpack(&directory, entries).unwrap_err();
            assert!(!victim.exists(), "{entries:?}");
            fs::remove_dir_all(&directory).unwrap();
        }
        for link in [
            "..",
            "../..",
            "/",
            "a/../..",
            "./../..",
            "../x/../..",
            "/etc/passwd",
        ] {
            fs::create_dir(&directory).unwrap();
            // It is left out, and what would go through it is in a directory of its name.
            let left_out = unpack(&directory, &[(LINK, "d", link), (FILE, "d/victim", "x")]);
            let left_out = left_out.unwrap();
            assert_eq!(left_out.len(), 1, "{link}");
            assert_eq!(
                fs::read_to_string(directory.join("new/victim")).unwrap(),
                "x"
            );
            assert!(!victim.exists());
            fs::remove_dir_all(&directory).unwrap();
        }
        // One that was there before leads no copy out either.
        fs::create_dir(&directory).unwrap();
        symlink(outer.path(), directory.join("new")).unwrap();
        unpack(&directory, &[(FILE, "d/victim", "x")]).unwrap_err();
        assert!(!victim.exists());
        // What is replaced is the link.
        fs::write(&victim, "mine").unwrap();
        fs::remove_file(directory.join("new")).unwrap();
        symlink(&victim, directory.join("new")).unwrap();
        unpack(&directory, &[(FILE, "d", "x")]).unwrap();
        assert_eq!(fs::read_to_string(&victim).unwrap(), "mine");
    }

    #[test]
    fn a_link_stays_within_if_it_goes_up_first_and_not_too_far() {
        for (link, depth, stays) in [
            ("a", 0, true),
            ("./a", 0, true),
            ("..", 0, false),
            ("..", 1, true),
            ("../../a", 1, false),
            ("../../a", 2, true),
            ("a/..", 5, false),
            ("/a", 5, false),
        ] {
            assert_eq!(
                stays_within(Path::new(link), depth),
                stays,
                "{link} {depth}"
            );
        }
    }

    #[test]
    fn what_is_no_archive_or_not_what_was_asked_for_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let run = |first, bytes: &[u8]| {
            let from = Some(PathBuf::from("d"));
            Unpack::new(directory.path(), from.clone(), from, first)
                .unwrap()
                .run(bytes)
        };
        assert!(run(Kind::Any, &[]).is_err());
        assert!(run(Kind::Any, &[7; 600]).is_err());
        let mut cut = archive(&[(FILE, "d", "text")]);
        cut.truncate(514);
        assert!(run(Kind::Any, &cut).is_err());
        assert!(run(Kind::Directory, &archive(&[(FILE, "d", "")])).is_err());
        assert!(run(Kind::File, &archive(&[(DIR, "d", "")])).is_err());
        let many = vec![(EntryType::Fifo, "d/p", ""); TOLD + 5];
        let left_out = run(Kind::Any, &archive(&many)).unwrap();
        assert_eq!(
            (left_out.len(), left_out[TOLD].as_str()),
            (TOLD + 1, "5 more")
        );
    }
}
