//! Opening a file of records (redb): whole, or set aside for one that is empty.
//!
//! A daemon that does not start because its records are broken can't end, remove or even show what
//! runs on its node. So a file that can't be what it was is renamed, said to be lost, and replaced.
//! What says nothing about the file, as an I/O error or another process that has it open, stays an
//! error: who renames a good file loses it.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use redb::{Database, DatabaseError, StorageError, backends::FileBackend};

/// What of a database is kept in memory, bytes. redb's own choice is 1 GiB: all of it, in the end.
const CACHE: usize = 4 << 20;
/// Only its owner reads it: records hold what pods are given, secrets too.
const MODE: u32 = 0o600;

/// A file of records that could not be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the records in {} are lost ({reason}); the file is kept as {}", path.display(), kept.display())]
pub struct Broken {
    /// Where it was.
    pub path: PathBuf,
    /// Where it is now.
    pub kept: PathBuf,
    /// What is wrong with it.
    pub reason: String,
}

/// Opens a database, and creates it when absent. Every page is verified. One that is broken is
/// renamed to `<name>.broken-<Unix time>`; the new one is empty then. Blocks.
///
/// # Errors
/// When it is open elsewhere, or the file system fails.
pub fn open(path: &Path) -> Result<(Database, Option<Broken>), DatabaseError> {
    let reason = match attempt(path) {
        Ok(database) => return Ok((database, None)),
        Err(error) if is_broken(&error) => error.to_string(),
        Err(error) => return Err(error),
    };
    let broken = set_aside(path, reason)?;
    Ok((attempt(path)?, Some(broken)))
}

/// Renames a file of records that can't be used.
///
/// # Errors
/// When the file system fails.
pub fn set_aside(path: &Path, reason: String) -> io::Result<Broken> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let mut seconds = now.unwrap_or_default().as_secs();
    let kept = loop {
        let mut name = path.as_os_str().to_owned();
        name.push(format!(".broken-{seconds}"));
        let kept = PathBuf::from(name);
        if !kept.try_exists()? {
            break kept;
        }
        seconds += 1;
    };
    fs::rename(path, &kept)?;
    Ok(Broken {
        path: path.to_owned(),
        kept,
        reason,
    })
}

fn attempt(path: &Path) -> Result<Database, DatabaseError> {
    let is_new = !path.try_exists()?;
    let file = private(path)?;
    // It would be taken for a new one.
    if !is_new && file.metadata()?.len() == 0 {
        return Err(StorageError::Corrupted("the file is empty".into()).into());
    }
    Database::builder()
        .set_cache_size(CACHE)
        // Else what was cut or altered is trusted, and may end the process later.
        .set_check_integrity_on_open(true)
        .create_with_backend(FileBackend::new(file)?)
}

/// The file, readable for its owner alone, whatever it was before.
fn private(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(MODE)
        .open(path)?;
    if file.metadata()?.permissions().mode() & 0o777 != MODE {
        file.set_permissions(Permissions::from_mode(MODE))?;
    }
    Ok(file)
}

/// Whether an error is about what is in the file.
fn is_broken(error: &DatabaseError) -> bool {
    match error {
        DatabaseError::UpgradeRequired(_) | DatabaseError::Storage(StorageError::Corrupted(_)) => {
            true
        }
        DatabaseError::Storage(StorageError::Io(error)) => matches!(
            error.kind(),
            // Another format, and a file that is shorter than it says.
            io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof
        ),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use redb::{ReadableDatabase, TableDefinition};

    use super::*;

    const TABLE: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("table");

    fn filled(path: &Path) {
        let (database, broken) = open(path).unwrap();
        assert_eq!(broken, None);
        let transaction = database.begin_write().unwrap();
        {
            let mut table = transaction.open_table(TABLE).unwrap();
            for key in 0..100 {
                table.insert(key, [7; 1000].as_slice()).unwrap();
            }
        }
        transaction.commit().unwrap();
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn a_file_that_is_broken_in_any_way_is_kept_beside_a_new_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.redb");
        filled(&path);
        let whole = fs::read(&path).unwrap();
        let mut cases: Vec<(&str, Vec<u8>)> = vec![
            ("empty", Vec::new()),
            ("no database", b"not a database at all".to_vec()),
            ("cut in its header", whole[..100].to_vec()),
            ("cut", whole[..whole.len() / 2].to_vec()),
            ("zeroed", vec![0; whole.len()]),
        ];
        let mut flipped = whole.clone();
        let at = flipped.iter().rposition(|byte| *byte == 7).unwrap();
        flipped[at] = 8;
        cases.push(("altered", flipped));
        let mut newer = whole.clone();
        // The version of the format, in both commit slots.
        (newer[64], newer[192]) = (99, 99);
        cases.push(("of another version", newer));
        for (what, bytes) in cases {
            fs::write(&path, &bytes).unwrap();
            let (database, broken) = open(&path).unwrap_or_else(|e| panic!("{what}: {e}"));
            let broken = broken.unwrap_or_else(|| panic!("{what} was not noticed"));
            assert_eq!(fs::read(&broken.kept).unwrap(), bytes, "{what}");
            assert_eq!((mode(&broken.kept), mode(&path)), (MODE, MODE), "{what}");
            let read = database.begin_read().unwrap();
            assert!(read.open_table(TABLE).is_err(), "{what}");
            fs::remove_file(&broken.kept).unwrap();
        }
    }

    #[test]
    fn one_that_is_good_or_in_use_or_unreachable_is_not_renamed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.redb");
        filled(&path);
        let (database, broken) = open(&path).unwrap();
        assert_eq!(broken, None);
        let busy = open(&path).unwrap_err();
        assert!(matches!(busy, DatabaseError::DatabaseAlreadyOpen), "{busy}");
        drop(database);
        assert!(open(&dir.path().join("absent/x.redb")).is_err());
        fs::create_dir(dir.path().join("directory")).unwrap();
        assert!(open(&dir.path().join("directory")).is_err());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn one_that_others_could_read_is_closed_to_them() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.redb");
        filled(&path);
        fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        open(&path).unwrap();
        assert_eq!(mode(&path), MODE);
    }
}
