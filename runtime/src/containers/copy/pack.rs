//! Files here as an archive. What is made of it belongs to who unpacks it, as docker has it.

use std::{
    fs::{self, File, Metadata},
    io::{self, Read, Write},
    path::Path,
};

use tar::{Builder, Header};

use super::remote::Links;

/// Writes what is at `path` under `name`; returns what was left out.
pub(super) fn pack(
    path: &Path,
    name: &Path,
    links: Links,
    out: impl Write,
) -> io::Result<Vec<String>> {
    let mut packing = Packing {
        tar: Builder::new(out),
        links,
        left_out: Vec::new(),
    };
    packing.add(path, name)?;
    packing.tar.finish()?;
    Ok(packing.left_out)
}

struct Packing<W: Write> {
    tar: Builder<W>,
    links: Links,
    left_out: Vec<String>,
}

impl<W: Write> Packing<W> {
    fn add(&mut self, path: &Path, name: &Path) -> io::Result<()> {
        let about =
            |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
        let found = match self.links {
            Links::Followed => fs::metadata(path),
            Links::Kept => fs::symlink_metadata(path),
        };
        let found = found.map_err(about)?;
        let mut header = header(&found);
        if found.is_dir() {
            self.tar
                .append_data(&mut header, name.join(""), io::empty())?;
            let entries = fs::read_dir(path).map_err(about)?;
            let mut entries = entries.collect::<io::Result<Vec<_>>>().map_err(about)?;
            entries.sort_by_key(fs::DirEntry::file_name);
            for entry in entries {
                self.add(&entry.path(), &name.join(entry.file_name()))?;
            }
        } else if found.is_symlink() {
            let leads_to = fs::read_link(path).map_err(about)?;
            self.tar.append_link(&mut header, name, leads_to)?;
        } else if found.is_file() {
            let content = Whole {
                file: File::open(path).map_err(about)?,
                left: found.len(),
            };
            self.tar.append_data(&mut header, name, content)?;
        } else {
            self.left_out
                .push(format!("{} is no file, directory or link", path.display()));
        }
        Ok(())
    }
}

fn header(found: &Metadata) -> Header {
    let mut header = Header::new_gnu();
    header.set_metadata(found);
    header.set_uid(0);
    header.set_gid(0);
    if !found.is_file() {
        header.set_size(0);
    }
    header
}

/// As many bytes of a file as the archive says: others would be taken for what comes next.
struct Whole {
    file: File,
    left: u64,
}

impl Read for Whole {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = (&self.file).take(self.left).read(buffer)?;
        if count == 0 && self.left > 0 && !buffer.is_empty() {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "a file became shorter",
            ));
        }
        self.left = self.left.saturating_sub(count as u64);
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::{fs::symlink, net::UnixListener};

    use super::*;

    #[test]
    fn a_tree_is_packed_under_another_name_with_its_links_or_what_they_lead_to() {
        let directory = tempfile::tempdir().unwrap();
        let tree = directory.path().join("tree");
        fs::create_dir_all(tree.join("sub")).unwrap();
        fs::write(tree.join("sub/file"), "text").unwrap();
        symlink("sub/file", tree.join("link")).unwrap();
        let _socket = UnixListener::bind(tree.join("socket")).unwrap();
        for (links, linked) in [(Links::Kept, ""), (Links::Followed, "text")] {
            let mut bytes = Vec::new();
            let left_out = pack(&tree, Path::new("new"), links, &mut bytes).unwrap();
            assert!(
                left_out[0].contains("socket") && left_out.len() == 1,
                "{left_out:?}"
            );
            let mut archive = tar::Archive::new(&bytes[..]);
            let mut seen = Vec::new();
            for entry in archive.entries().unwrap() {
                let mut entry = entry.unwrap();
                let header = entry.header();
                assert_eq!((header.uid().unwrap(), header.gid().unwrap()), (0, 0));
                let name = entry.path().unwrap().display().to_string();
                let mut text = String::new();
                entry.read_to_string(&mut text).unwrap();
                seen.push((name, text));
            }
            let expected = [
                ("new/", ""),
                ("new/link", linked),
                ("new/sub/", ""),
                ("new/sub/file", "text"),
            ];
            let seen: Vec<_> = seen.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
            assert_eq!(seen, expected);
        }
    }

    #[test]
    fn a_file_that_becomes_shorter_is_an_error() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"abc").unwrap();
        io::Seek::rewind(&mut file).unwrap();
        let mut whole = Whole { file, left: 5 };
        let error = whole.read_to_end(&mut Vec::new()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
