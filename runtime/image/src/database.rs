//! Opening a file of records (redb): whole, or set aside for one that is empty.
//!
//! A daemon that does not start because its records are broken can't end, remove or even show what
//! runs on its node. So a file that can't be what it was is renamed, said to be lost, and replaced.
//! What says nothing about the file, as an I/O error or another process that has it open, stays an
//! error: who renames a good file loses it.
//!
//! redb refuses all work on a database once a write to its file has failed. A disk that was full must
//! not cost a node more than the calls that needed it, so a [`Store`] opens the file again.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{PoisonError, RwLock};
use std::time::{SystemTime, UNIX_EPOCH};

use redb::{Database, DatabaseError, StorageError};

mod backend;

use backend::Backend;
pub use backend::Points;

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

/// A file of records that is open.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    points: Points,
    /// None: it could not be opened again yet.
    open: RwLock<Option<Database>>,
    /// A write has failed since it was opened.
    failed: AtomicBool,
}

impl Store {
    /// Opens a database, and creates it when absent. Every page is verified. One that is broken is
    /// renamed to `<name>.broken-<Unix time>`; the new one is empty then. Blocks.
    ///
    /// # Errors
    /// When it is open elsewhere, or the file system fails.
    pub fn open(path: &Path, points: Points) -> Result<(Self, Option<Broken>), DatabaseError> {
        let opened = |database| Self {
            path: path.to_owned(),
            points,
            open: RwLock::new(Some(database)),
            failed: AtomicBool::new(false),
        };
        let reason = match attempt(path, points) {
            Ok(database) => return Ok((opened(database), None)),
            Err(error) if is_broken(&error) => error.to_string(),
            Err(error) => return Err(error),
        };
        let broken = set_aside(path, reason)?;
        Ok((opened(attempt(path, points)?), Some(broken)))
    }

    /// Works with the database, which is opened again first if a write has failed before. Blocks.
    ///
    /// # Errors
    /// Those of the work, and those of opening.
    pub fn with<T>(
        &self,
        work: impl FnOnce(&Database) -> Result<T, redb::Error>,
    ) -> Result<T, redb::Error> {
        loop {
            let open = self.open.read();
            if let Some(database) = &*open.unwrap_or_else(PoisonError::into_inner)
                && !self.failed.load(Ordering::Acquire)
            {
                return work(database).inspect_err(|error| {
                    if matches!(error, redb::Error::Io(_) | redb::Error::PreviousIo) {
                        self.failed.store(true, Ordering::Release);
                    }
                });
            }
            // Waits for the work of others.
            let mut open = self.open.write().unwrap_or_else(PoisonError::into_inner);
            if open.is_none() || self.failed.load(Ordering::Acquire) {
                // The lock of the file goes with it.
                *open = None;
                *open = Some(attempt(&self.path, self.points)?);
                self.failed.store(false, Ordering::Release);
                tracing::warn!(path = %self.path.display(), "opened again after a write failed");
            }
        }
    }
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

fn attempt(path: &Path, points: Points) -> Result<Database, DatabaseError> {
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
        .create_with_backend(Backend::new(file, points)?)
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
    use std::process::Command;

    use hull_base::faults::Point;
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    use redb::{ReadableDatabase, ReadableTableMetadata, TableDefinition};

    use super::*;

    const TABLE: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("table");

    const POINTS: Points = Points {
        write: Point::StoreWrite,
        sync: Point::StoreSync,
    };

    fn open(path: &Path) -> Result<(Store, Option<Broken>), DatabaseError> {
        Store::open(path, POINTS)
    }

    fn fill(store: &Store, keys: std::ops::Range<u64>) -> Result<(), redb::Error> {
        store.with(|database| {
            let transaction = database.begin_write()?;
            {
                let mut table = transaction.open_table(TABLE)?;
                for key in keys {
                    table.insert(key, [7; 1000].as_slice())?;
                }
            }
            Ok(transaction.commit()?)
        })
    }

    fn filled(path: &Path) {
        let (store, broken) = open(path).unwrap();
        assert_eq!(broken, None);
        fill(&store, 0..100).unwrap();
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
            let read = database.with(|database| {
                database.begin_read()?.open_table(TABLE)?;
                Ok(())
            });
            assert!(read.is_err(), "{what}");
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

    /// In a process of its own, whose files may not grow beyond a limit for a while.
    #[test]
    fn one_whose_file_could_not_be_written_goes_on_when_it_can_be() {
        const NAME: &str =
            "database::tests::one_whose_file_could_not_be_written_goes_on_when_it_can_be";
        if std::env::var_os("HULL_TEST_INSIDE").is_none() {
            // The signal would end the process.
            let status = Command::new("sh")
                .args(["-c", "trap '' XFSZ; exec \"$0\" --exact \"$1\""])
                .arg(std::env::current_exe().unwrap())
                .arg(NAME)
                .env("HULL_TEST_INSIDE", "1")
                .status();
            assert!(status.unwrap().success());
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.redb");
        let (store, _) = open(&path).unwrap();
        fill(&store, 0..100).unwrap();
        let (_, most) = getrlimit(Resource::RLIMIT_FSIZE).unwrap();
        let limit = fs::metadata(&path).unwrap().len();
        setrlimit(Resource::RLIMIT_FSIZE, limit, most).unwrap();
        fill(&store, 100..5000).unwrap_err();
        fill(&store, 100..5000).unwrap_err();
        setrlimit(Resource::RLIMIT_FSIZE, most, most).unwrap();
        fill(&store, 100..200).unwrap();
        let count = store.with(|database| Ok(database.begin_read()?.open_table(TABLE)?.len()?));
        assert_eq!(count.unwrap(), 200);
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
