//! The daemon↔file server contract, spoken on the socket of each `hull-fs`.
//!
//! Framed as the VMM's: a length and JSON ([`crate::encode`]). A connection
//! carries one [`Request`] and its [`Response`]; the socket listens for the life
//! of the server, so a restarted daemon just connects again.
//!
//! The server gets FUSE requests of the VMM on its standard input, a
//! `SOCK_SEQPACKET` Unix socket: a packet is a request or a reply. When its
//! other end is closed, the VM is gone and the server ends.
//!
//! What the guest finds below the root of its mount: `<owner>/<index>`, a
//! directory or a file. A path that two owners share in the same way is there
//! once, so that both meet in it: a Unix socket, a FIFO or a lock of one is the
//! other's too. It stays until both are gone.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The contract version that this build speaks.
pub const VERSION: u32 = 1;
/// The most data of one FUSE read or write, in bytes: what a client does that
/// was not told of more (FUSE_DEFAULT_MAX_PAGES_PER_REQ, 32 pages).
pub const MAX_DATA: usize = 128 << 10;
/// The largest packet, in bytes: data, headers and names.
pub const MAX_PACKET: usize = MAX_DATA + 4096;
/// What each end's send buffer must hold, in bytes: a few packets with the
/// kernel's own overhead.
pub const SEND_BUFFER: usize = 4 << 20;
/// The most bytes of what a guest knows ([`Request::Save`]): some 100 for each of the files that it may know.
pub const MAX_STATE: u64 = 64 << 20;
/// The most shares of one owner.
pub const MAX_SHARES: usize = 1024;

/// What the daemon asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Version handshake; tells whose shares there are.
    Hello {
        /// The daemon's contract version.
        version: u32,
    },
    /// Shares paths of the host, all or none of them.
    Add {
        /// Whose they are: ASCII letters, digits, `-`.
        owner: String,
        /// The shares.
        shares: Vec<Share>,
        /// kubelet's id of the pod, by which its own volumes are known; empty: it has none.
        #[serde(default)]
        uid: String,
    },
    /// Ends all shares of an owner; one that is unknown has none.
    Remove {
        /// Whose.
        owner: String,
    },
    /// Asks for all shares and for what the guest knows of them, to go on with in another server. The VM stands
    /// still.
    Save,
    /// Goes on with what a guest knew of another server. There are no shares yet. After the message there are `bytes`
    /// bytes of what it knew, as they followed [`Response::Saved`].
    Resume {
        /// The shares that it had; their paths may be others. What it knew of shares that are left out is stale.
        owners: Vec<Owner>,
        /// As in [`Request::Add`].
        uid: String,
        /// How many bytes follow, at most [`MAX_STATE`].
        bytes: u64,
    },
}

/// An owner and its shares.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// Whose they are.
    pub name: String,
    /// Those that are its own, each with its index.
    pub shares: Vec<(usize, Share)>,
    /// Other owners whose shares it uses.
    pub uses: Vec<String>,
    /// Whether it has ended, and others use its shares.
    pub has_ended: bool,
}

/// A file or directory of the host, with what is mounted below it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    /// Its path on the host, absolute; symbolic links are followed.
    pub path: PathBuf,
    /// What the guest may do with it.
    pub access: Access,
    /// What becomes of mounts that the host makes later.
    pub propagation: Propagation,
}

/// What the guest may do with a share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Access {
    /// Read and write.
    ReadWrite,
    /// Read; but write to what is mounted below it, where the host can.
    ReadOnly,
    /// Read.
    RecursiveReadOnly,
}

/// What becomes of mounts that the host makes later below a share
/// (mount_namespaces(7)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Propagation {
    /// They don't appear.
    Private,
    /// They appear.
    Slave,
}

/// The server's answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Response {
    /// Done.
    Ok,
    /// To [`Request::Hello`].
    Hello {
        /// The server's contract version.
        version: u32,
        /// Who has shares.
        owners: Vec<String>,
    },
    /// To [`Request::Add`]: what the shares are.
    Added {
        /// For each share, whether it is a directory.
        directories: Vec<bool>,
        /// For each share, `<owner>/<index>`. An older server does not tell: then it is the
        /// owner's own, by its position.
        #[serde(default)]
        places: Vec<String>,
    },
    /// To [`Request::Save`]. After the message there are `bytes` bytes of what the guest knows.
    Saved {
        /// All owners.
        owners: Vec<Owner>,
        /// How many bytes follow, at most [`MAX_STATE`].
        bytes: u64,
    },
    /// To [`Request::Resume`].
    Resumed {
        /// How many files, and open files, are not there any more.
        lost: u64,
    },
    /// The request failed and had no effect; one that was to resume leaves a server of no use.
    Error {
        /// What kind of failure.
        kind: ErrorKind,
        /// The share that failed, by its position.
        share: Option<usize>,
        /// Why, for a person.
        message: String,
    },
}

/// Kinds of failure that the daemon tells apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// The path is not there.
    NotFound,
    /// It is neither a directory nor a regular file.
    Special,
    /// The request is malformed.
    Invalid,
    /// Anything else.
    Internal,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server outlives the daemon that started it: this form must stay readable.
    #[test]
    fn the_wire_is_this() {
        let request = Request::Add {
            owner: "abc".into(),
            shares: vec![Share {
                path: "/srv".into(),
                access: Access::RecursiveReadOnly,
                propagation: Propagation::Slave,
            }],
            uid: "7".into(),
        };
        let json = r#"{"add":{"owner":"abc","shares":[{"path":"/srv","access":"recursive_read_only","propagation":"slave"}],"uid":"7"}}"#;
        assert_eq!(serde_json::to_string(&request).unwrap(), json);
        let frame = crate::encode(&request).unwrap();
        assert_eq!(crate::decode::<Request>(&frame[4..]).unwrap(), request);
        let older = r#"{"add":{"owner":"abc","shares":[]}}"#;
        assert!(matches!(
            serde_json::from_str(older).unwrap(),
            Request::Add { uid, .. } if uid.is_empty()
        ));
        let older = r#"{"added":{"directories":[true]}}"#;
        let added = Response::Added {
            directories: vec![true],
            places: Vec::new(),
        };
        assert_eq!(serde_json::from_str::<Response>(older).unwrap(), added);
    }
}
