//! The disk against the kernel: what it mounts is compared, file by file, with what GNU tar
//! unpacks from the same layers.
#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use common::registry::RealRegistry;
use common::{Flavor, Packing, TestImage, TestStore};

/// Runs a command to its success.
fn run(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{command:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

fn shell(directory: &Path, script: &str) {
    run(Command::new("bash")
        .args(["-euc", script])
        .current_dir(directory));
}

/// A mounted file system, for as long as the value lives.
struct Mounted(PathBuf);

impl Mounted {
    fn new(device: &Path, at: &Path) -> Self {
        fs::create_dir(at).unwrap();
        run(Command::new("mount")
            .args(["-t", "erofs", "-o", "ro,loop"])
            .arg(device)
            .arg(at));
        Self(at.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

/// Why these tests cannot run here, if they cannot.
fn obstacle() -> Option<&'static str> {
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if !nix::unistd::geteuid().is_root() {
        Some("mount and mknod: run as root")
    } else if !known.contains("erofs") {
        Some("mount EROFS: this kernel does not have it; run the tests in the KVM host")
    } else if Command::new("fsck.erofs").arg("-V").output().is_err() {
        Some("run fsck.erofs: install it with: apt-get install erofs-utils")
    } else {
        None
    }
}

/// All that can be seen of a file.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    mode: u32,
    owner: (u32, u32),
    time: (i64, i64),
    size: u64,
    links: u64,
    device: u64,
    target: Option<PathBuf>,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// The first path, in sorted order, of the same inode.
    same_as: Vec<u8>,
}

fn look(root: &Path) -> BTreeMap<Vec<u8>, Seen> {
    let mut paths = vec![PathBuf::new()];
    let mut pending = vec![PathBuf::new()];
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(root.join(&directory)).unwrap() {
            let entry = entry.unwrap();
            let path = directory.join(entry.file_name());
            if entry.file_type().unwrap().is_dir() {
                pending.push(path.clone());
            }
            paths.push(path);
        }
    }
    paths.sort();
    let mut first_names = HashMap::new();
    let mut seen = BTreeMap::new();
    for path in paths {
        let full = if path.as_os_str().is_empty() {
            root.to_owned()
        } else {
            root.join(&path)
        };
        let metadata = fs::symlink_metadata(&full).unwrap();
        let file_type = metadata.file_type();
        let name = path.as_os_str().as_bytes().to_vec();
        let target = file_type
            .is_symlink()
            .then(|| fs::read_link(&full).unwrap());
        let is_device = file_type.is_char_device() || file_type.is_block_device();
        let xattrs = xattr::list(&full)
            .unwrap()
            .map(|name| {
                let value = xattr::get(&full, &name).unwrap().unwrap_or_default();
                (name.as_bytes().to_vec(), value)
            })
            .collect();
        let same_as: &mut Vec<u8> = first_names
            .entry(metadata.ino())
            .or_insert_with(|| name.clone());
        seen.insert(
            name.clone(),
            Seen {
                mode: metadata.mode(),
                owner: (metadata.uid(), metadata.gid()),
                time: (metadata.mtime(), metadata.mtime_nsec()),
                // What a directory's size means differs between file systems.
                size: if file_type.is_dir() {
                    0
                } else {
                    metadata.size()
                },
                links: metadata.nlink(),
                device: if is_device { metadata.rdev() } else { 0 },
                target,
                xattrs,
                same_as: same_as.clone(),
            },
        );
    }
    seen
}

fn compare(mounted: &Path, reference: &Path) -> usize {
    let roots = [mounted, reference];
    let (mounted, reference) = (look(mounted), look(reference));
    let mut differences = Vec::new();
    for path in mounted.keys().chain(reference.keys()) {
        let (ours, theirs) = (mounted.get(path), reference.get(path));
        if ours != theirs && differences.len() < 10 {
            differences.push(format!(
                "{}\n  disk: {ours:?}\n  tar:  {theirs:?}",
                path.escape_ascii()
            ));
        }
    }
    for (path, _) in mounted
        .iter()
        .filter(|(_, seen)| seen.mode & 0o170_000 == 0o100_000)
    {
        let [ours, theirs] =
            roots.map(|root| fs::read(root.join(OsStr::from_bytes(path))).unwrap());
        if ours != theirs {
            differences.push(format!("{}: contents differ", path.escape_ascii()));
        }
    }
    assert!(differences.is_empty(), "{}", differences.join("\n"));
    mounted.len()
}

/// Pushes the layers, pulls them, and compares the mounted disk with the reference.
async fn check(work: &Path, layers: &[(PathBuf, Packing)], reference: &Path) -> Option<usize> {
    let registry = RealRegistry::start().await?;
    let layers: Vec<(Vec<u8>, Packing)> = layers
        .iter()
        .map(|(path, packing)| (fs::read(path).unwrap(), *packing))
        .collect();
    let image = TestImage::new(Flavor::Oci, &layers);
    registry.push("test/disk", "t", &image).await;
    let test = TestStore::open().await;
    let name = format!("{}/test/disk:t", registry.address());
    let started = std::time::Instant::now();
    test.store.pull(&name, None).await.unwrap();
    println!("pull took {:?}", started.elapsed());
    let device = work.join("device");
    test.device(&name, &device).await;
    run(Command::new("fsck.erofs").arg(&device));
    let mounted = Mounted::new(&device, &work.join("mounted"));
    let count = compare(&mounted.0, reference);
    println!("{count} files are the same");
    Some(count)
}

const TAR: &str = "--numeric-owner --xattrs --xattrs-include=* --acls";

#[tokio::test(flavor = "multi_thread")]
async fn a_nasty_tree_mounts_as_tar_unpacks_it() {
    if let Some(obstacle) = obstacle() {
        println!("SKIPPED: {obstacle}");
        return;
    }
    let work = tempfile::tempdir().unwrap();
    let work = work.path();
    let tree = work.join("tree");
    fs::create_dir(&tree).unwrap();
    for name in [
        &b"new\nline"[..],
        b"not\xffutf8\x01",
        b"-rf",
        b" ",
        b"!",
        b"a\\b",
        "é".as_bytes(),
        &[b'n'; 255],
    ] {
        fs::write(tree.join(OsStr::from_bytes(name)), name).unwrap();
    }
    for size in [0usize, 1, 4095, 4096, 4097, 70_000] {
        fs::write(tree.join(format!("size-{size}")), vec![b's'; size]).unwrap();
    }
    shell(
        &tree,
        r#"
        mkdir -p many deep/$(seq -s/ 1 100) long empty noaccess
        (cd many; seq -f 'a file with a rather long name number %g' 1 3000 | xargs -d '\n' touch)
        for n in 1 59 60 255 4000; do ln -s "$(head -c $n /dev/zero | tr '\0' t)" long/link$n; done
        ln -s ../../../../etc/passwd outside; ln -s /abs/olute absolute; ln -s loop loop
        echo one > linked; ln linked deep/linked2; ln linked many/linked3
        ln -s x slink; ln slink slink2
        mknod null c 1 3; mknod disk b 8 17; mknod far c 4000 1000000; mkfifo pipe
        ln null null2
        cp /bin/true suid; chmod 6755 suid; chown 1:2 suid; chmod 4755 suid
        mkdir -m 1777 sticky; mkdir -m 2775 sgid; chmod 000 noaccess
        touch owned; chown 70000:4000000000 owned; chown -h 12:34 outside
        touch -d '1960-02-03 04:05:06.789 UTC' old; touch -d '2150-01-02 03:04:05.000000006 UTC' new
        touch -h -d '2001-02-03 UTC' absolute; touch -d '1999-09-09 UTC' many
        truncate -s 40M holes; printf x | dd of=holes bs=1 seek=30000000 conv=notrunc status=none
        setfattr -n user.name -v value size-1; setfattr -n user.empty -v '' size-1
        setfattr -n user.big -v "$(head -c 3000 /dev/zero | tr '\0' v)" size-0
        setfattr -n trusted.dir -v t empty; setfattr -n security.thing -v s empty
        setfattr -h -n trusted.link -v l outside
        "#,
    );
    // cap_net_raw+ep, as setcap writes it.
    let capability = [1, 0, 0, 2, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    xattr::set(tree.join("size-4096"), "security.capability", &capability).unwrap();
    let archive = |format: &str, options: &str| {
        let file = work.join(format!("{format}.tar"));
        let script = format!(
            "tar -c {options} --sparse --format={format} -f {} .",
            file.display()
        );
        shell(&tree, &script);
        file
    };
    let pax = archive("pax", TAR);
    let gnu = archive("gnu", "--numeric-owner");
    for (archive, packing, name) in [(pax, Packing::Zstd, "pax"), (gnu, Packing::Gzip, "gnu")] {
        let work = work.join(format!("work-{name}"));
        let reference = work.join("reference");
        fs::create_dir_all(&reference).unwrap();
        shell(
            &reference,
            &format!("tar -xp {TAR} -f {}", archive.display()),
        );
        let Some(count) = check(&work, &[(archive, packing)], &reference).await else {
            return;
        };
        assert!(count > 3100, "{count}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_mount_as_if_unpacked_over_each_other() {
    if let Some(obstacle) = obstacle() {
        println!("SKIPPED: {obstacle}");
        return;
    }
    let work = tempfile::tempdir().unwrap();
    let work = work.path();
    for directory in ["one", "two", "three", "reference"] {
        fs::create_dir(work.join(directory)).unwrap();
    }
    shell(
        work,
        r#"
        (cd one; mkdir -p usr/bin usr/lib keep/sub opaque/sub data; ln -s usr/bin bin
         echo a > usr/bin/a; echo b > usr/bin/b; echo k > keep/sub/k; echo o > opaque/sub/o
         echo x > data/x; echo y > data/y; ln data/x data/x2; echo file > becomes-dir; mkdir becomes-file
         chmod 750 keep; chown 5:6 keep)
        (cd two; mkdir -p usr/bin opaque becomes-dir data; echo a2 > usr/bin/a; echo n > opaque/new
         echo in > becomes-dir/in; echo f > becomes-file; echo y2 > data/y
         touch opaque/.wh..wh..opq usr/bin/.wh.b data/.wh.x data/.wh.none)
        (cd three; mkdir keep; chmod 711 keep; chown 7:8 keep; echo z > data.z; touch .wh.becomes-dir)
        for l in one two three; do tar -c -C $l --numeric-owner --sort=name --format=pax -f $l.tar .; done
        # What a runtime that unpacks one layer after the other does with them.
        cd reference
        tar -xpf ../one.tar
        rm -r opaque/sub usr/bin/b data/x becomes-dir becomes-file
        tar -xpf ../two.tar; find . -name '.wh.*' -delete
        rm -r becomes-dir
        tar -xpf ../three.tar; find . -name '.wh.*' -delete
        # The directories that the clean-up above changed have the time of their last layer.
        touch -r ../three . ; touch -r ../two/opaque opaque; touch -r ../two/usr/bin usr/bin
        touch -r ../two/data data
        "#,
    );
    let layers = [
        (work.join("one.tar"), Packing::Gzip),
        (work.join("two.tar"), Packing::Plain),
        (work.join("three.tar"), Packing::Zstd),
    ];
    check(work, &layers, &work.join("reference")).await;
}

/// Makes `debian.tar`: of the directory in `HULL_TEST_ROOTFS` (e.g. what debootstrap made), else
/// of the files of this machine's essential packages, as they are installed (with merged /usr).
const MAKE_DEBIAN: &str = r#"
    if [ -n "${HULL_TEST_ROOTFS:-}" ]; then
        exec tar -c -C "$HULL_TEST_ROOTFS" --numeric-owner --xattrs --xattrs-include=* --format=pax -f debian.tar .
    fi
    dpkg-query -Wf '${Essential} ${Package}\n' | sed -n 's/^yes //p' | xargs dpkg -L |
        sed -E 's|^/||; s#^(bin|sbin|lib|lib64)/#usr/&#' | sort -u | grep -vxE 'sys|proc|dev|run|tmp|' |
        while IFS= read -r f; do
            if [ -e "/$f" ] || [ -L "/$f" ]; then echo "$f"; fi
        done > list
    tar -c -C / --no-recursion -T list --numeric-owner --xattrs --format=pax -f debian.tar
"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_debian_tree_mounts_as_tar_unpacks_it() {
    if let Some(obstacle) = obstacle() {
        println!("SKIPPED: {obstacle}");
        return;
    }
    let work = tempfile::tempdir().unwrap();
    let work = work.path();
    let made = Command::new("bash")
        .args(["-euc", MAKE_DEBIAN])
        .current_dir(work)
        .output();
    if !made.as_ref().is_ok_and(|made| made.status.success()) {
        println!("SKIPPED: make a tree of Debian's essential packages: {made:?}");
        return;
    }
    let reference = work.join("reference");
    fs::create_dir(&reference).unwrap();
    // Links come between a directory and its files in this order, which confuses tar's own delay.
    shell(
        &reference,
        &format!("tar -xp {TAR} --delay-directory-restore -f ../debian.tar"),
    );
    let layers = [(work.join("debian.tar"), Packing::Gzip)];
    if let Some(count) = check(work, &layers, &reference).await {
        assert!(count > 1000, "{count}");
    }
}
