//! The files that a VM is made of, recognised by their first bytes.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    os::unix::fs::PermissionsExt,
    path::Path,
};

use super::finding::Finding;

const ELF: &[u8] = b"\x7fELF";
/// The superblock's magic, at byte 1024 (little endian 0xe0f5e1e2).
const EROFS: &[u8] = &[0xe2, 0xe1, 0xf5, 0xe0];
const ADVICE: &str = "install Hull's files there, or name their directory with --assets";

/// The VMM, or the file server.
pub(super) fn program(path: &Path) -> Finding {
    match std::fs::metadata(path) {
        Ok(meta) if meta.is_file() && meta.permissions().mode() & 0o111 != 0 => {
            Finding::Good(path.display().to_string())
        }
        Ok(_) => Finding::bad(format!("{} is not a program", path.display()), ADVICE),
        Err(error) => absent(path, &error),
    }
}

/// The guest's kernel.
pub(super) fn kernel(path: &Path) -> Finding {
    magic(path, 0, ELF, "an uncompressed kernel (ELF vmlinux)")
}

/// The guest's root with the agent.
pub(super) fn guest_root(path: &Path) -> Finding {
    magic(path, 1024, EROFS, "an EROFS image")
}

fn magic(path: &Path, offset: u64, magic: &[u8], kind: &str) -> Finding {
    let read = || -> io::Result<bool> {
        let mut file = File::open(path)?;
        file.seek(SeekFrom::Start(offset))?;
        let mut bytes = vec![0; magic.len()];
        match file.read_exact(&mut bytes) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
            result => result.map(|()| bytes == magic),
        }
    };
    match read() {
        Ok(true) => Finding::Good(path.display().to_string()),
        Ok(false) => Finding::bad(format!("{} is not {kind}", path.display()), ADVICE),
        Err(error) => absent(path, &error),
    }
}

fn absent(path: &Path, error: &io::Error) -> Finding {
    Finding::bad(format!("open {}: {error}", path.display()), ADVICE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_recognised_by_content() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        assert!(!kernel(&path).is_good());
        std::fs::write(&path, b"\x7fELF....").unwrap();
        assert!(kernel(&path).is_good());
        assert!(!guest_root(&path).is_good());
        assert!(!program(&path).is_good());
        let mut image = vec![0; 1024];
        image.extend_from_slice(EROFS);
        std::fs::write(&path, image).unwrap();
        assert!(guest_root(&path).is_good());
        assert!(program(Path::new("/bin/sh")).is_good());
    }
}
