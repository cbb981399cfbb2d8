//! What a guest calls its files that goes on from a checkpoint: it knows nodes and open files by numbers of the
//! server that it had, and this server has others.
//!
//! ```text
//! guest ─ request ─▶ [Renumbered::request] ─▶ file system ─▶ [Renumbered::answer] ─ answer ─▶ guest
//! ```
//! What was known keeps its number, and what the guest comes to know later gets one that none of those is. The
//! numbers are changed in the packets, so the file system knows nothing of it. A guest that never was saved has no
//! such table, and the numbers are those of the file system.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use fuse_backend_rs::abi::fuse_abi::Opcode;

use crate::packet::{IN_HEADER, ROOT, double_word, owner_index, put, word};

/// Bytes of `fuse_out_header`.
const OUT_HEADER: usize = 16;
/// Bytes of `fuse_entry_out`, and of a `fuse_dirent` without its name.
const ENTRY: usize = 128;
const DIRENT: usize = 24;
/// Where a request has the number of its node.
const NODE: usize = 16;
/// Of FUSE_GETATTR and FUSE_SETATTR: there is a handle (FUSE_GETATTR_FH, FATTR_FH).
const GETATTR_HANDLE: u32 = 1;
const SETATTR_HANDLE: u32 = 1 << 6;

/// A node that the guest knows.
#[derive(Debug, Clone, Copy)]
pub struct Node {
    /// Its number here.
    pub server: u64,
    /// Added to the generation that is told here.
    pub generation: u64,
    /// How many times the guest was told of it, less how many times it forgot it.
    pub lookups: u64,
    /// How many times the file system counted that.
    pub told: u64,
}

/// What becomes of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Known {
    /// It has the server's numbers now.
    All,
    /// It is about what is not here any more, and is answered with this error number.
    Lost(i32),
    /// There is nothing to do, and no answer.
    Nothing,
}

#[derive(Debug)]
struct State {
    nodes: HashMap<u64, Node>,
    /// What the guest calls a node of the server.
    guest: HashMap<u64, u64>,
    /// Files that are open since before: by owner's index and the guest's handle.
    open: HashMap<(u8, u64), u64>,
    /// The next number for a node.
    next: u64,
}

/// The numbers of a guest that goes on from a checkpoint.
#[derive(Debug)]
pub struct Renumbered {
    state: Mutex<State>,
    /// What handles of this server are higher by for the guest.
    above: u64,
}

impl Renumbered {
    /// Creates the table of what the guest knows, by its numbers.
    #[must_use]
    pub fn new(nodes: HashMap<u64, Node>, open: HashMap<(u8, u64), u64>) -> Self {
        let guest = nodes.iter().map(|(guest, node)| (node.server, *guest));
        let above = open.keys().map(|(_, handle)| *handle).max();
        let state = State {
            guest: guest.collect(),
            next: nodes.keys().copied().max().unwrap_or(ROOT),
            nodes,
            open,
        };
        Self {
            state: Mutex::new(state),
            above: above.unwrap_or(0).wrapping_add(1),
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the guest calls a node of the server, and what is known of it; none: it does not know it.
    #[must_use]
    pub fn node(&self, server: u64) -> Option<(u64, Node)> {
        let state = self.state();
        let guest = state.guest.get(&server)?;
        Some((*guest, *state.nodes.get(guest)?))
    }

    /// What the guest calls an open file of an owner.
    #[must_use]
    pub fn handle(&self, index: u8, server: u64) -> u64 {
        let state = self.state();
        let mut old = state.open.iter();
        let old = old.find(|((of, _), handle)| (*of, **handle) == (index, server));
        old.map_or_else(|| server.wrapping_add(self.above), |((_, guest), _)| *guest)
    }

    /// Puts the server's numbers into a request, which has passed [`crate::filter::judge`].
    pub fn request(&self, packet: &mut [u8]) -> Known {
        use Opcode as O;
        let Some(opcode) = word(packet, 4) else {
            return Known::Nothing;
        };
        let is = |any: &[Opcode]| any.iter().any(|other| *other as u32 == opcode);
        let state = &mut *self.state();
        if is(&[O::Init, O::Destroy, O::Interrupt]) {
            return Known::All;
        }
        if is(&[O::BatchForget]) {
            return state.forget_all(packet);
        }
        let Some(node) = double_word(packet, NODE) else {
            return Known::Nothing;
        };
        if is(&[O::Forget]) {
            let count = double_word(packet, IN_HEADER).unwrap_or_default();
            let Some((server, told)) = state.forgotten(node, count) else {
                return Known::Nothing;
            };
            put(packet, NODE, server);
            put(packet, IN_HEADER, told);
            return Known::All;
        }
        let other = is(&[O::Rename, O::Rename2, O::Link]).then_some(IN_HEADER);
        for at in [Some(NODE), other].into_iter().flatten() {
            let Some(server) = double_word(packet, at).and_then(|node| state.server(node)) else {
                return Known::Lost(libc::ESTALE);
            };
            put(packet, at, server);
        }
        let flags = word(packet, IN_HEADER).unwrap_or_default();
        let at = if is(&[O::Getattr]) {
            (flags & GETATTR_HANDLE != 0).then_some(IN_HEADER + 8)
        } else if is(&[O::Setattr]) {
            (flags & SETATTR_HANDLE != 0).then_some(IN_HEADER + 8)
        } else {
            let has_handle = is(&[
                O::Read,
                O::Write,
                O::Readdir,
                O::Readdirplus,
                O::Release,
                O::Releasedir,
                O::Flush,
                O::Fsync,
                O::Fsyncdir,
                O::Fallocate,
                O::Lseek,
            ]);
            has_handle.then_some(IN_HEADER)
        };
        if let Some(at) = at {
            let index = owner_index(double_word(packet, NODE).unwrap_or_default());
            let Some(handle) = double_word(packet, at) else {
                return Known::Lost(libc::EINVAL);
            };
            let server = match handle.checked_sub(self.above) {
                Some(server) => Some(server),
                None if is(&[O::Release, O::Releasedir]) => state.open.remove(&(index, handle)),
                None => state.open.get(&(index, handle)).copied(),
            };
            let Some(server) = server else {
                return Known::Lost(libc::ESTALE);
            };
            put(packet, at, server);
        }
        Known::All
    }

    /// Whether answers to a request have numbers in them.
    #[must_use]
    pub fn is_told(request: &[u8]) -> bool {
        use Opcode as O;
        let all = [
            O::Lookup,
            O::Symlink,
            O::Mknod,
            O::Mkdir,
            O::Link,
            O::Create,
            O::Open,
            O::Opendir,
            O::Readdirplus,
        ];
        word(request, 4).is_some_and(|opcode| all.iter().any(|told| *told as u32 == opcode))
    }

    /// Puts the guest's numbers into the answer to a request.
    pub fn answer(&self, request: &[u8], answer: &mut [u8]) {
        let Some(opcode) = word(request, 4).filter(|_| word(answer, 4) == Some(0)) else {
            return;
        };
        let is = |other: Opcode| other as u32 == opcode;
        let state = &mut *self.state();
        if is(Opcode::Open) || is(Opcode::Opendir) {
            self.opened(answer, OUT_HEADER);
        } else if is(Opcode::Readdirplus) {
            let mut at = OUT_HEADER;
            while let Some(length) = word(answer, at + ENTRY + 16) {
                state.tell(answer, at);
                at += ENTRY + (DIRENT + length as usize).next_multiple_of(8);
            }
        } else {
            state.tell(answer, OUT_HEADER);
            if is(Opcode::Create) {
                self.opened(answer, OUT_HEADER + ENTRY);
            }
        }
    }

    fn opened(&self, answer: &mut [u8], at: usize) {
        if let Some(server) = double_word(answer, at) {
            put(answer, at, server.wrapping_add(self.above));
        }
    }
}

impl State {
    fn server(&self, guest: u64) -> Option<u64> {
        if guest == ROOT {
            return Some(ROOT);
        }
        self.nodes.get(&guest).map(|node| node.server)
    }

    /// Notes that the guest forgot a node so many times; returns what the file system is to forget.
    fn forgotten(&mut self, guest: u64, count: u64) -> Option<(u64, u64)> {
        let node = self.nodes.get_mut(&guest)?;
        node.lookups = node.lookups.saturating_sub(count);
        if node.lookups > 0 {
            return None;
        }
        let node = self.nodes.remove(&guest)?;
        self.guest.remove(&node.server);
        Some((node.server, node.told))
    }

    /// FUSE_BATCH_FORGET: what nothing is to be done about becomes the root, which is never forgotten.
    fn forget_all(&mut self, packet: &mut [u8]) -> Known {
        let count = word(packet, IN_HEADER).unwrap_or_default();
        for item in 0..count as usize {
            let at = IN_HEADER + 8 + 16 * item;
            let (Some(guest), Some(count)) = (double_word(packet, at), double_word(packet, at + 8))
            else {
                break;
            };
            let (server, told) = self.forgotten(guest, count).unwrap_or((ROOT, 0));
            put(packet, at, server);
            put(packet, at + 8, told);
        }
        Known::All
    }

    /// Puts the guest's number into a `fuse_entry_out`.
    fn tell(&mut self, answer: &mut [u8], at: usize) {
        let (Some(server), Some(generation)) =
            (double_word(answer, at), double_word(answer, at + 8))
        else {
            return;
        };
        // There is no such name.
        if server == 0 || server == ROOT {
            return;
        }
        let guest = match self.guest.get(&server) {
            Some(guest) => *guest,
            None => self.number(server),
        };
        put(answer, at, guest);
        if let Some(node) = self.nodes.get_mut(&guest) {
            node.lookups = node.lookups.saturating_add(1);
            node.told = node.told.saturating_add(1);
            put(answer, at + 8, generation.wrapping_add(node.generation));
        }
    }

    /// Gives a node a number that the guest does not know.
    fn number(&mut self, server: u64) -> u64 {
        loop {
            self.next = self.next.wrapping_add(1);
            if self.next > ROOT && !self.nodes.contains_key(&self.next) {
                break;
            }
        }
        let node = Node {
            server,
            generation: 0,
            lookups: 0,
            told: 0,
        };
        self.nodes.insert(self.next, node);
        self.guest.insert(server, self.next);
        self.next
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KNOWN: u64 = (1 << 56) | 7;
    const HERE: u64 = (2 << 56) | 9;

    /// One that knows a node, by two lookups, and a file that is open.
    fn table() -> Renumbered {
        let node = Node {
            server: HERE,
            generation: 3,
            lookups: 2,
            told: 1,
        };
        Renumbered::new(HashMap::from([(KNOWN, node)]), HashMap::from([((2, 5), 1)]))
    }

    fn request(opcode: Opcode, node: u64, body: &[u64]) -> Vec<u8> {
        let mut packet = vec![0; IN_HEADER];
        packet[4..8].copy_from_slice(&(opcode as u32).to_le_bytes());
        put(&mut packet, NODE, node);
        packet.extend(body.iter().flat_map(|word| word.to_le_bytes()));
        packet
    }

    fn entry(node: u64, generation: u64) -> Vec<u8> {
        let mut entry = vec![0; ENTRY];
        put(&mut entry, 0, node);
        put(&mut entry, 8, generation);
        entry
    }

    /// What the guest is told of an entry.
    fn told(table: &Renumbered, opcode: Opcode, body: &[u8]) -> Vec<u64> {
        let mut answer = [&[0; OUT_HEADER], body].concat();
        table.answer(&request(opcode, ROOT, &[]), &mut answer);
        let words = answer[OUT_HEADER..].chunks_exact(8);
        words
            .map(|word| u64::from_le_bytes(word.try_into().unwrap()))
            .collect()
    }

    #[test]
    fn what_was_known_keeps_its_number_and_what_is_new_gets_another() {
        let table = table();
        let found = told(&table, Opcode::Lookup, &entry(HERE, 0));
        assert_eq!(found[..2], [KNOWN, 3]);
        let new = told(&table, Opcode::Mkdir, &entry(KNOWN, 0))[0];
        assert_ne!(
            new, KNOWN,
            "the server's number is another file's to the guest"
        );
        assert_eq!(
            told(&table, Opcode::Lookup, &entry(KNOWN, 1))[..2],
            [new, 1]
        );
        assert_eq!(told(&table, Opcode::Lookup, &entry(0, 0))[0], 0);
        let mut link = request(Opcode::Link, KNOWN, &[new]);
        assert_eq!(table.request(&mut link), Known::All);
        assert_eq!(double_word(&link, NODE), Some(HERE));
        assert_eq!(double_word(&link, IN_HEADER), Some(KNOWN));
        for unknown in [
            request(Opcode::Getattr, 1234, &[0]),
            request(Opcode::Rename, ROOT, &[1234]),
        ] {
            assert_eq!(
                table.request(&mut unknown.clone()),
                Known::Lost(libc::ESTALE)
            );
        }
        let mut error = vec![0; OUT_HEADER];
        error[4] = 255;
        table.answer(&request(Opcode::Lookup, ROOT, &[]), &mut error);
        assert_eq!(error[4], 255);
    }

    #[test]
    fn the_server_forgets_when_the_guest_has_forgotten_all() {
        let table = table();
        told(&table, Opcode::Lookup, &entry(HERE, 0));
        let forget = |count| {
            let mut packet = request(Opcode::Forget, KNOWN, &[count]);
            let known = table.request(&mut packet);
            (
                known,
                double_word(&packet, NODE),
                double_word(&packet, IN_HEADER),
            )
        };
        assert_eq!(forget(2).0, Known::Nothing);
        // Two were counted here: one when it went on, one since.
        assert_eq!(forget(1), (Known::All, Some(HERE), Some(2)));
        assert_eq!(forget(1).0, Known::Nothing);
        assert!(table.node(HERE).is_none());
        let new = told(&table, Opcode::Lookup, &entry(HERE, 0))[0];
        let other = told(&table, Opcode::Lookup, &entry(HERE + 1, 0))[0];
        told(&table, Opcode::Lookup, &entry(HERE + 1, 0));
        let mut packet = request(Opcode::BatchForget, 0, &[3, new, 1, other, 1, 99, 1]);
        assert_eq!(table.request(&mut packet), Known::All);
        let words: Vec<_> = (0..6)
            .map(|n| double_word(&packet, 48 + 8 * n).unwrap())
            .collect();
        assert_eq!(words, [HERE, 1, ROOT, 0, ROOT, 0]);
    }

    #[test]
    fn open_files_are_those_of_before_and_those_of_this_server() {
        let table = table();
        let handle = |opcode, handle| {
            let mut packet = request(opcode, KNOWN, &[handle, 0]);
            let known = table.request(&mut packet);
            (known, double_word(&packet, IN_HEADER))
        };
        assert_eq!(handle(Opcode::Read, 5), (Known::All, Some(1)));
        let new = told(&table, Opcode::Open, &1_u64.to_le_bytes())[0];
        assert_eq!(new, 7);
        assert_eq!(handle(Opcode::Write, new), (Known::All, Some(1)));
        let created = [entry(HERE, 0), 2_u64.to_le_bytes().to_vec()].concat();
        assert_eq!(told(&table, Opcode::Create, &created)[ENTRY / 8], 8);
        assert_eq!((table.handle(2, 1), table.handle(2, 2)), (5, 8));
        for (flag, opcode) in [
            (GETATTR_HANDLE, Opcode::Getattr),
            (SETATTR_HANDLE, Opcode::Setattr),
        ] {
            let mut packet = request(opcode, KNOWN, &[u64::from(flag), 5]);
            assert_eq!(table.request(&mut packet), Known::All);
            assert_eq!(double_word(&packet, IN_HEADER + 8), Some(1));
            let mut packet = request(opcode, KNOWN, &[0, 5]);
            assert_eq!(table.request(&mut packet), Known::All);
            assert_eq!(double_word(&packet, IN_HEADER + 8), Some(5));
        }
        assert_eq!(handle(Opcode::Flush, 4).0, Known::Lost(libc::ESTALE));
        assert_eq!(handle(Opcode::Release, 5), (Known::All, Some(1)));
        assert_eq!(handle(Opcode::Read, 5).0, Known::Lost(libc::ESTALE));
    }

    #[test]
    fn each_entry_of_a_listing_has_the_guests_number() {
        let table = table();
        let listed = |node, name: &[u8]| {
            let mut all = entry(node, 0);
            all.extend([0; 16]);
            all.extend((name.len() as u32).to_le_bytes());
            all.extend([0; 4]);
            all.extend(name);
            all.resize(all.len().next_multiple_of(8), 0);
            all
        };
        let listing = [
            listed(HERE, b"a"),
            listed(0, b"."),
            listed(HERE, b"eightand1"),
        ]
        .concat();
        let words = told(&table, Opcode::Readdirplus, &listing);
        let step = (ENTRY + 32) / 8;
        assert_eq!([words[0], words[step], words[2 * step]], [KNOWN, 0, KNOWN]);
        assert_eq!(table.node(HERE).unwrap().1.lookups, 4);
        // What is no listing is read to its end, and no further.
        let listing = request(Opcode::Readdirplus, ROOT, &[]);
        table.answer(&listing, &mut [0; OUT_HEADER + ENTRY + 19]);
    }
}
