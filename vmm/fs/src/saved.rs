//! What a guest knows of its files, to go on with another server: numbers and paths.
//!
//! A checkpoint of a VM has a guest that knows files by numbers of the server that it had ([`save`]). The server
//! of a VM that goes on from it finds the same paths in the shares that it got, opens again what was open, and
//! keeps the guest's numbers ([`resume`], [`Renumbered`]). What is not there any more, or was deleted while it was
//! open, is stale to the guest (ESTALE). What the guest forgets while this is written may stay known for as long as
//! the VM that goes on.

use std::collections::HashMap;
use std::ffi::{CString, OsStr};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

use fuse_backend_rs::api::filesystem::{Context, FileSystem};
use hull_proto_vmm::fs::MAX_STATE;
use serde::{Deserialize, Serialize};

use crate::bounded::Bounded;
use crate::files::Files;
use crate::packet::{ROOT, node_of, owner_index};
use crate::renumber::{Node, Renumbered};

/// The version of what is written, raised with each change.
const VERSION: u32 = 1;
/// Flags of open(2) that were obeyed when the file was opened.
const OBEYED: u32 = (libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC) as u32;
/// An owner's directory and a share's place in it.
const SHARE_DEPTH: usize = 2;

/// All that a guest knows.
#[derive(Debug, Serialize, Deserialize)]
struct Session {
    version: u32,
    /// How its kernel began (FUSE_INIT); empty: it did not.
    init: Vec<u8>,
    files: Vec<SavedFile>,
    open: Vec<SavedOpen>,
}

/// A file that it knows.
#[derive(Debug, Serialize, Deserialize)]
struct SavedFile {
    /// The guest's number of it.
    number: u64,
    generation: u64,
    /// How many times it was told of it, less how many times it forgot it.
    lookups: u64,
    /// Its type (S_IFMT).
    kind: u32,
    /// From the root of all shares.
    path: PathBytes,
}

/// A file that it has open.
#[derive(Debug, Serialize, Deserialize)]
struct SavedOpen {
    /// The guest's number of the file.
    number: u64,
    /// The guest's handle.
    handle: u64,
    /// Of open(2).
    flags: u32,
    directory: bool,
}

/// A path, which need not be text.
#[derive(Debug, Serialize, Deserialize)]
struct PathBytes(Vec<u8>);

impl PathBytes {
    fn of(path: &Path) -> Self {
        Self(path.as_os_str().as_bytes().to_vec())
    }

    fn into_path(self) -> PathBuf {
        std::ffi::OsString::from_vec(self.0).into()
    }
}

/// Writes what the guest knows of all shares.
///
/// # Errors
/// The reason, in words for the manager.
pub fn save(files: &Files) -> Result<Vec<u8>, String> {
    let names = files.renumbered();
    let mut session = Session {
        version: VERSION,
        init: files.begun(),
        files: Vec::new(),
        open: Vec::new(),
    };
    for (index, path, share) in files.all() {
        let Some(share) = share.as_any().downcast_ref::<Bounded>() else {
            continue;
        };
        let guests = |server: u64, generation: u64, lookups: u64| match &names {
            None => Some((server, generation, lookups)),
            Some(names) => names.node(server).map(|(guest, node)| {
                let generation = generation.wrapping_add(node.generation);
                (guest, generation, node.lookups)
            }),
        };
        // The owner's directory is never forgotten.
        if let Some((number, generation, lookups)) = guests(node_of(index, ROOT), 0, u64::MAX) {
            session.files.push(SavedFile {
                number,
                generation,
                lookups,
                kind: libc::S_IFDIR,
                path: PathBytes::of(relative(&path)),
            });
        }
        for known in share.known() {
            let server = node_of(index, known.number);
            let told = guests(server, known.generation, known.lookups);
            if let Some((number, generation, lookups)) = told.filter(|_| known.number != ROOT) {
                session.files.push(SavedFile {
                    number,
                    generation,
                    lookups,
                    kind: known.kind,
                    path: PathBytes::of(relative(&known.path)),
                });
            }
        }
        for (handle, open) in share.all_open() {
            if let Some((number, ..)) = guests(node_of(index, open.number), 0, 0) {
                session.open.push(SavedOpen {
                    number,
                    handle: names
                        .as_ref()
                        .map_or(handle, |names| names.handle(index, handle)),
                    flags: open.flags,
                    directory: open.directory,
                });
            }
        }
    }
    let bytes = postcard::to_stdvec(&session).map_err(|e| e.to_string())?;
    if bytes.len() as u64 > MAX_STATE {
        let count = session.files.len();
        return Err(format!(
            "the guest knows too many files of the host: {count}"
        ));
    }
    Ok(bytes)
}

fn relative(path: &Path) -> &Path {
    path.strip_prefix("/").unwrap_or(path)
}

/// Goes on with what a guest knew. All owners' shares are served. `begin` begins the session as the guest's kernel
/// did. Returns the guest's numbers, and how many files and open files are not there any more.
///
/// # Errors
/// The reason, in words for the manager: `bytes` are none of [`save`], or a share is a file where it was a
/// directory.
pub fn resume(
    files: &Files,
    bytes: &[u8],
    begin: impl FnOnce(&mut [u8]) -> bool,
) -> Result<(Renumbered, usize), String> {
    let mut session: Session = postcard::from_bytes(bytes).map_err(|e| e.to_string())?;
    if session.version != VERSION {
        return Err(format!("it has version {}, not {VERSION}", session.version));
    }
    if !session.init.is_empty() && !begin(&mut session.init) {
        return Err("the session can't be begun".to_owned());
    }
    let mut tree = Tree::new(files);
    let mut nodes: HashMap<u64, Node> = HashMap::new();
    let mut lost = 0;
    for saved in session.files {
        let path = saved.path.into_path();
        let is_share = path.components().count() <= SHARE_DEPTH;
        match tree.take(&path, saved.kind) {
            Some(server) => {
                let node = Node {
                    server,
                    generation: saved.generation,
                    lookups: saved.lookups,
                    told: 0,
                };
                nodes.insert(saved.number, node);
            }
            None if is_share && tree.has(&path) => {
                return Err(format!("{} is not what it was", path.display()));
            }
            None => lost += 1,
        }
    }
    tree.settle(&mut nodes);
    let mut open = HashMap::new();
    for saved in session.open {
        let opened = nodes.get(&saved.number).and_then(|node| {
            let (inode, flags) = (node.server.into(), saved.flags & !OBEYED);
            let context = Context::default();
            let handle = if saved.directory {
                files.vfs.opendir(&context, inode, flags).ok()?.0
            } else {
                files.vfs.open(&context, inode, flags, 0).ok()?.0
            };
            Some(((owner_index(node.server), saved.handle), handle?))
        });
        match opened {
            Some((guest, server)) => drop(open.insert(guest, server)),
            None => lost += 1,
        }
    }
    Ok((Renumbered::new(nodes, open), lost))
}

/// Paths that are looked up, once each.
struct Tree<'a> {
    files: &'a Files,
    /// The number and type of each; none: it is not there.
    found: HashMap<PathBuf, Option<(u64, u32)>>,
    /// How many times the file system counted each, and whether the guest knows it.
    told: HashMap<u64, (u64, bool)>,
}

impl<'a> Tree<'a> {
    fn new(files: &'a Files) -> Self {
        let root = (PathBuf::new(), Some((ROOT, libc::S_IFDIR)));
        Self {
            files,
            found: HashMap::from([root]),
            told: HashMap::new(),
        }
    }

    /// Finds what the guest knows by this path and no other.
    fn take(&mut self, path: &Path, kind: u32) -> Option<u64> {
        let (number, _) = self.find(path).filter(|found| found.1 == kind)?;
        let (_, is_taken) = self.told.get_mut(&number)?;
        (!std::mem::replace(is_taken, true)).then_some(number)
    }

    /// Whether something has this path, which was looked for.
    fn has(&self, path: &Path) -> bool {
        self.found.get(path).is_some_and(Option::is_some)
    }

    fn find(&mut self, path: &Path) -> Option<(u64, u32)> {
        let mut at = PathBuf::new();
        let mut found = Some((ROOT, libc::S_IFDIR));
        for component in path.components() {
            let Component::Normal(name) = component else {
                return None;
            };
            let (parent, _) = found?;
            at.push(name);
            found = match self.found.get(&at) {
                Some(known) => *known,
                None => {
                    let looked_up = self.look_up(parent, name);
                    self.found.insert(at.clone(), looked_up);
                    looked_up
                }
            };
        }
        found
    }

    fn look_up(&mut self, parent: u64, name: &OsStr) -> Option<(u64, u32)> {
        let name = CString::new(name.as_bytes()).ok()?;
        let context = Context::default();
        let entry = self.files.vfs.lookup(&context, parent.into(), &name).ok()?;
        // A negative entry has no number.
        if entry.inode == 0 {
            return None;
        }
        self.told.entry(entry.inode).or_default().0 += 1;
        Some((entry.inode, entry.attr.st_mode & libc::S_IFMT))
    }

    /// Notes how many times each was counted; what the guest does not know is forgotten.
    fn settle(self, nodes: &mut HashMap<u64, Node>) {
        for node in nodes.values_mut() {
            node.told = self.told.get(&node.server).map_or(0, |told| told.0);
        }
        for (number, (count, is_known)) in self.told {
            if !is_known {
                self.files
                    .vfs
                    .forget(&Context::default(), number.into(), count);
            }
        }
    }
}
