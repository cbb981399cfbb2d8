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
            // Overlayfs lists its marks in directories that it merges with none.
            if entry.file_type().unwrap().is_char_device() && entry.metadata().is_err() {
                continue;
            }
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

/// How many names a file has: told, or not comparable with the reference.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Links {
    Count,
    Ignore,
}

fn compare(mounted: &Path, reference: &Path, links: Links) -> usize {
    let roots = [mounted, reference];
    let (mut mounted, mut reference) = (look(mounted), look(reference));
    if links == Links::Ignore {
        for seen in mounted.values_mut().chain(reference.values_mut()) {
            seen.links = 0;
        }
    }
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
    check_links(work, layers, reference, Links::Count).await
}

async fn check_links(
    work: &Path,
    layers: &[(PathBuf, Packing)],
    reference: &Path,
    links: Links,
) -> Option<usize> {
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
    let count = compare(&mounted.0, reference, links);
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

#[tokio::test(flavor = "multi_thread")]
async fn names_and_links_that_try_to_leave_stay_inside() {
    if let Some(obstacle) = obstacle() {
        println!("SKIPPED: {obstacle}");
        return;
    }
    let work = tempfile::tempdir().unwrap();
    let work = work.path();
    shell(
        work,
        r#"
        mkdir -p one/etc one/usr/lib one/a one/srv two/evil two/up two/lib two/loop three/evil three/lib reference
        # Links out of the image, by which the next layer goes.
        ln -s /etc one/evil; ln -s ../../../.. one/up; ln -s usr/lib one/lib; ln -s .. one/a/loop
        echo old > one/usr/lib/old; echo keep > one/etc/keep
        tar -c -C one --numeric-owner --sort=name --format=pax -f one.tar .
        # Absolute names and .. within, which GNU tar writes when told to.
        echo absolute > one/srv/abs; echo dotted > one/srv/dot
        tar -r -P -C one --numeric-owner --format=pax -f one.tar --transform 's|^srv/abs$|/srv//./abs|' srv/abs
        tar -r -P -C one --numeric-owner --format=pax -f one.tar --transform 's|^srv/dot$|a/../srv/dot|' srv/dot
        # A name that comes twice: another name of the first file keeps what it was.
        echo first > one/srv/twice; ln one/srv/twice one/srv/other
        tar -r -C one --numeric-owner --format=pax -f one.tar srv/twice srv/other
        rm one/srv/twice; echo second > one/srv/twice
        tar -r -C one --numeric-owner --format=pax -f one.tar srv/twice
        # What was a link or a file becomes a directory, and the other way round.
        mkdir one/srv/kind; echo in > one/srv/kind/in; ln -s nowhere one/srv/kind2
        tar -r -C one --numeric-owner --format=pax -f one.tar srv/kind srv/kind2
        rm -r one/srv/kind one/srv/kind2; echo file > one/srv/kind; mkdir one/srv/kind2; echo in > one/srv/kind2/in
        tar -r -C one --numeric-owner --format=pax -f one.tar srv/kind srv/kind2
        tar -r -C one --numeric-owner --format=pax --no-recursion -f one.tar srv

        echo stolen > two/evil/passwd; echo top > two/up/top; echo new > two/lib/new
        ln two/evil/passwd two/hard
        tar -c -C two --numeric-owner --format=pax -f two.tar evil/passwd up/top lib/new hard
        # Whiteouts by way of links, too.
        touch three/evil/.wh.keep three/lib/.wh.old three/.wh.nothing
        tar -c -C three --numeric-owner --format=pax -f three.tar evil/.wh.keep lib/.wh.old .wh.nothing

        cp -a one/. reference; cd reference
        cp -a ../two/evil/passwd etc/passwd; cp -a ../two/up/top top; cp -a ../two/lib/new usr/lib/new
        ln etc/passwd hard; rm etc/keep usr/lib/old
        # Directories that no later layer names have the times of the first.
        touch -r ../one .; touch -r ../one/etc etc; touch -r ../one/usr/lib usr/lib
        "#,
    );
    let layers =
        ["one", "two", "three"].map(|name| (work.join(format!("{name}.tar")), Packing::Gzip));
    let outside = fs::read("/etc/passwd").unwrap();
    if let Some(count) = check(work, &layers, &work.join("reference")).await {
        assert!(count > 20, "{count}");
    }
    assert_eq!(fs::read("/etc/passwd").unwrap(), outside);
}

/// Numbers that look random and are the same in every run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % sides
    }

    fn path(&mut self) -> String {
        let names = ["a", "b", "new\nline", "é", "-x"];
        let parts: Vec<_> = (0..=self.roll(3)).map(|_| names[self.roll(5)]).collect();
        parts.join("/")
    }
}

/// Fills a layer's directory with what comes; what can't be made there is left out.
fn random_layer(directory: &Path, dice: &mut Dice) {
    for _ in 0..30 {
        let path = directory.join(dice.path());
        let parent = path.parent().unwrap();
        if fs::create_dir_all(parent).is_err() {
            continue;
        }
        let marker = parent.join(format!(
            ".wh.{}",
            path.file_name().unwrap().to_str().unwrap()
        ));
        let target = directory.join(dice.path());
        let made = match dice.roll(9) {
            0 => fs::create_dir(&path),
            1 => std::os::unix::fs::symlink(dice.path(), &path),
            2 => fs::hard_link(&target, &path),
            3 | 4 => fs::write(marker, ""),
            5 => fs::write(parent.join(".wh..wh..opq"), ""),
            6 if fs::symlink_metadata(&path).is_err() => Command::new("mknod")
                .arg(&path)
                .args(["c", "1", "3"])
                .status()
                .map(drop),
            _ => fs::write(&path, vec![dice.roll(256) as u8; dice.roll(9000)]),
        };
        // It is there already as something else, or there is nothing to link to.
        if made.is_ok() && fs::symlink_metadata(&path).is_ok_and(|it| !it.is_symlink()) {
            let mode = [0o755, 0o700, 0o1777, 0o4711, 0o640][dice.roll(5)];
            let mode = std::os::unix::fs::PermissionsExt::from_mode(mode);
            fs::set_permissions(&path, mode).unwrap();
        }
    }
}

/// Turns the markers of OCI layers into those of overlayfs.
fn for_overlayfs(directory: &Path) {
    let entries: Vec<_> = fs::read_dir(directory)
        .unwrap()
        .map(Result::unwrap)
        .collect();
    let times = fs::metadata(directory).unwrap();
    for entry in entries {
        let name = entry.file_name();
        let text = name.to_str().unwrap();
        if entry.file_type().unwrap().is_dir() {
            for_overlayfs(&entry.path());
        } else if text == ".wh..wh..opq" {
            fs::remove_file(entry.path()).unwrap();
            xattr::set(directory, "trusted.overlay.opaque", b"y").unwrap();
        } else if let Some(hidden) = text.strip_prefix(".wh.") {
            fs::remove_file(entry.path()).unwrap();
            let hidden = directory.join(hidden);
            // A layer's own files stay; of a directory, what is below it goes.
            match fs::symlink_metadata(&hidden) {
                Ok(own) if own.is_dir() => {
                    xattr::set(&hidden, "trusted.overlay.opaque", b"y").unwrap();
                }
                Ok(_) => {}
                Err(_) => run(Command::new("mknod").arg(&hidden).args(["c", "0", "0"])),
            }
        }
    }
    let times = fs::FileTimes::new().set_modified(times.modified().unwrap());
    fs::File::open(directory).unwrap().set_times(times).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn random_layers_mount_as_overlayfs_shows_them() {
    if let Some(obstacle) = obstacle() {
        println!("SKIPPED: {obstacle}");
        return;
    }
    let base = tempfile::tempdir().unwrap();
    // Not on another overlay, which would keep the marks for itself.
    run(Command::new("mount")
        .args(["-t", "tmpfs", "tmpfs"])
        .arg(base.path()));
    let _tmpfs = Mounted(base.path().to_owned());
    let mut dice = Dice(1);
    let mut files = 0;
    for round in 0..12 {
        let work = base.path().join(round.to_string());
        let mut layers = Vec::new();
        let mut lower = Vec::new();
        for layer in 0..4 {
            let directory = work.join(format!("layer{layer}"));
            let unpacked = work.join(format!("unpacked{layer}"));
            fs::create_dir_all(&directory).unwrap();
            fs::create_dir_all(&unpacked).unwrap();
            random_layer(&directory, &mut dice);
            let archive = work.join(format!("{layer}.tar"));
            let (from, to) = (directory.display(), archive.display());
            shell(
                &work,
                &format!("tar -c -C {from} --numeric-owner --format=pax -f {to} ."),
            );
            shell(&unpacked, &format!("tar -xp -f {to}"));
            for_overlayfs(&unpacked);
            let packing = [Packing::Plain, Packing::Gzip, Packing::Zstd][dice.roll(3)];
            layers.push((archive, packing));
            if directory.join(".wh..wh..opq").exists() {
                // Overlayfs does not look for the mark on a layer's root.
                lower.clear();
            }
            lower.insert(0, unpacked.to_str().unwrap().to_owned());
        }
        // It wants two layers at least.
        let (union, empty) = (work.join("union"), work.join("empty"));
        fs::create_dir(&union).unwrap();
        fs::create_dir(&empty).unwrap();
        lower.push(empty.to_str().unwrap().to_owned());
        run(Command::new("mount")
            .args(["-t", "overlay", "overlay", "-o"])
            .arg(format!("ro,lowerdir={}", lower.join(":")))
            .arg(&union));
        let union = Mounted(union);
        // Overlayfs counts names that upper layers hide, and none of merged directories.
        let count = check_links(&work, &layers, &union.0, Links::Ignore).await;
        let Some(count) = count else { return };
        files += count;
    }
    assert!(files > 100, "{files}");
}
