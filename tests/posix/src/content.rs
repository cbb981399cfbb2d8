//! What is in files.

use std::{
    env,
    fs::{self, File, OpenOptions},
    io::{Read, Seek, SeekFrom as From, Write},
    os::unix::{
        fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt},
        net::{UnixListener, UnixStream},
    },
    path::Path,
    process::Command,
    thread,
};

use rustix::{
    fs::{
        CWD, FallocateFlags, FileType, Mode, OFlags, SeekFrom, copy_file_range, fallocate,
        fcntl_getfl, fcntl_setfl, fdatasync, mknodat, seek, syncfs,
    },
    io::Errno,
};

use crate::place::Place;

const MIB: u64 = 1 << 20;

fn create(place: &Place, name: &str) -> File {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(true);
    options.open(place.at(name)).unwrap()
}

fn append(path: &Path) -> File {
    OpenOptions::new().append(true).open(path).unwrap()
}

/// Half full, half of zeros: 2 MiB.
fn filled(place: &Place) -> File {
    let file = create(place, "f");
    file.write_all_at(&vec![7; 2 * MIB as usize], 0).unwrap();
    file.sync_all().unwrap();
    file
}

fn blocks(file: &File) -> u64 {
    // Some file systems count what was written when it has been.
    file.sync_all().unwrap();
    file.metadata().unwrap().blocks()
}

pub fn appending_goes_to_the_end_whoever_else_writes(place: &Place) {
    let path = place.file("f", "start");
    let (mut one, mut two) = (append(&path), append(&path));
    let plain = OpenOptions::new().write(true).open(&path).unwrap();
    one.write_all(b"-1").unwrap();
    two.write_all(b"-2").unwrap();
    plain.write_all_at(b"S", 0).unwrap();
    plain.write_all_at(b"-far", 9).unwrap();
    one.write_all(b"-1").unwrap();
    // Linux ignores the offset.
    two.write_all_at(b"-2", 0).unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), "Start-1-2-far-1-2");
    plain.set_len(5).unwrap();
    one.write_all(b"!").unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), "Start!");
}

pub fn appending_is_switched_on_and_off(place: &Place) {
    let mut file = create(place, "f");
    file.write_all(b"0123456789").unwrap();
    let flags = fcntl_getfl(&file).unwrap();
    fcntl_setfl(&file, flags | OFlags::APPEND).unwrap();
    file.seek(From::Start(0)).unwrap();
    file.write_all(b"ab").unwrap();
    fcntl_setfl(&file, flags).unwrap();
    file.seek(From::Start(0)).unwrap();
    file.write_all(b"cd").unwrap();
    assert_eq!(fs::read_to_string(place.at("f")).unwrap(), "cd23456789ab");
}

pub fn threads_append_whole_lines(place: &Place) {
    let path = place.file("f", "");
    thread::scope(|scope| {
        for thread in 0..4 {
            let path = &path;
            scope.spawn(move || {
                let mut file = append(path);
                for line in 0..50 {
                    file.write_all(format!("{thread}:{line:050}\n").as_bytes())
                        .unwrap();
                }
            });
        }
    });
    let text = fs::read_to_string(&path).unwrap();
    assert_eq!(text.lines().count(), 200);
    for thread in 0..4 {
        let lines = text.lines().filter_map(|line| line.split_once(':'));
        let own = lines.filter(|(who, _)| *who == thread.to_string());
        for (expected, (_, line)) in own.enumerate() {
            assert_eq!(line, format!("{expected:050}"));
        }
    }
}

pub fn holes_are_found(place: &Place) {
    let file = create(place, "f");
    file.set_len(8 * MIB).unwrap();
    file.write_all_at(b"x", 4 * MIB).unwrap();
    file.sync_all().unwrap();
    assert_eq!(seek(&file, SeekFrom::Data(0)), Ok(4 * MIB));
    assert_eq!(seek(&file, SeekFrom::Hole(0)), Ok(0));
    let hole = seek(&file, SeekFrom::Hole(4 * MIB)).unwrap();
    assert!(hole > 4 * MIB && hole <= 5 * MIB, "{hole}");
    assert_eq!(seek(&file, SeekFrom::Data(hole)), Err(Errno::NXIO));
    assert_eq!(seek(&file, SeekFrom::Hole(8 * MIB)), Err(Errno::NXIO));
    assert!(blocks(&file) * 512 < 2 * MIB);
}

pub fn holes_are_punched(place: &Place) {
    let mut file = filled(place);
    let before = blocks(&file);
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&file, flags, MIB / 2, MIB).unwrap();
    assert!(blocks(&file) < before);
    assert_eq!(file.metadata().unwrap().len(), 2 * MIB);
    let mut data = Vec::new();
    file.read_to_end(&mut data).unwrap();
    let hole = (MIB / 2) as usize..(3 * MIB / 2) as usize;
    assert!(data[hole.clone()].iter().all(|byte| *byte == 0));
    assert!(data[..hole.start].iter().all(|byte| *byte == 7));
    assert!(data[hole.end..].iter().all(|byte| *byte == 7));
}

pub fn ranges_are_zeroed(place: &Place) {
    let mut file = filled(place);
    fallocate(&file, FallocateFlags::ZERO_RANGE, MIB, 2 * MIB).unwrap();
    let mut data = Vec::new();
    file.read_to_end(&mut data).unwrap();
    assert_eq!(data.len() as u64, 3 * MIB);
    assert!(data[..MIB as usize].iter().all(|byte| *byte == 7));
    assert!(data[MIB as usize..].iter().all(|byte| *byte == 0));
}

pub fn space_is_reserved_with_and_without_growth(place: &Place) {
    let file = create(place, "f");
    fallocate(&file, FallocateFlags::KEEP_SIZE, 0, MIB).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 0);
    assert!(blocks(&file) * 512 >= MIB);
    fallocate(&file, FallocateFlags::empty(), MIB, MIB).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 2 * MIB);
    assert!(blocks(&file) * 512 >= 2 * MIB);
    let mut byte = [1];
    file.read_exact_at(&mut byte, 2 * MIB - 1).unwrap();
    assert_eq!(byte, [0]);
}

pub fn reserving_refuses_what_it_must(place: &Place) {
    create(place, "f");
    let plain = FallocateFlags::empty();
    let read_only = File::open(place.at("f")).unwrap();
    assert_eq!(fallocate(&read_only, plain, 0, 1), Err(Errno::BADF));
    let writable = append(&place.at("f"));
    assert_eq!(fallocate(&writable, plain, 0, 0), Err(Errno::INVAL));
    let far = i64::MAX as u64;
    assert_eq!(fallocate(&writable, plain, far, 1), Err(Errno::FBIG));
    assert_eq!(writable.metadata().unwrap().len(), 0);
}

pub fn files_are_copied_by_range(place: &Place) {
    let from = filled(place);
    from.write_all_at(b"begin", 100).unwrap();
    let to = create(place, "to");
    let (mut input, mut output) = (100, 5);
    let mut left = MIB as usize;
    while left > 0 {
        let now = copy_file_range(&from, Some(&mut input), &to, Some(&mut output), left).unwrap();
        assert!(now > 0);
        left -= now;
    }
    assert_eq!((input, output), (100 + MIB, 5 + MIB));
    let data = fs::read(place.at("to")).unwrap();
    assert_eq!(data.len() as u64, 5 + MIB);
    assert_eq!(&data[..12], b"\0\0\0\0\0begin\x07\x07");
    // Nothing is left beyond the end.
    let mut end = 2 * MIB;
    assert_eq!(copy_file_range(&from, Some(&mut end), &to, None, 10), Ok(0));
    // To the other file system, which need not be possible but must not lie.
    let other = place.other.join("hull-posix-copy");
    let there = File::create(&other).unwrap();
    let mut input = 100;
    let copied = copy_file_range(&from, Some(&mut input), &there, None, 5);
    let text = fs::read_to_string(&other).unwrap();
    fs::remove_file(&other).unwrap();
    match copied {
        Ok(5) => assert_eq!(text, "begin"),
        other => assert_eq!(other, Err(Errno::XDEV)),
    }
}

pub fn offsets_beyond_4_gib(place: &Place) {
    let file = create(place, "f");
    let far = 9 << 30;
    file.write_all_at(b"far away", far).unwrap();
    assert_eq!(file.metadata().unwrap().len(), far + 8);
    let mut text = [0; 8];
    file.read_exact_at(&mut text, far).unwrap();
    assert_eq!(&text, b"far away");
    file.set_len(far + 3).unwrap();
    assert_eq!(file.read_at(&mut text, far).unwrap(), 3);
    assert!(blocks(&file) * 512 < 2 * MIB);
}

pub fn truncation_is_seen_by_all(place: &Place) {
    let path = place.file("f", "0123456789");
    let reader = File::open(&path).unwrap();
    let mut text = [0; 10];
    reader.read_exact_at(&mut text, 0).unwrap();
    let writer = append(&path);
    writer.set_len(3).unwrap();
    assert_eq!(reader.read_at(&mut text, 0).unwrap(), 3);
    // What was cut off does not come back.
    writer.set_len(10).unwrap();
    reader.read_exact_at(&mut text, 0).unwrap();
    assert_eq!(&text, b"012\0\0\0\0\0\0\0");
    File::create(&path).unwrap();
    assert_eq!(reader.read_at(&mut text, 0).unwrap(), 0);
    assert_eq!(reader.metadata().unwrap().len(), 0);
}

pub fn direct_io_is_coherent(place: &Place) {
    let path = place.file("f", &"a".repeat(8192));
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    options.custom_flags(OFlags::DIRECT.bits().cast_signed());
    let direct = options.open(&path).unwrap();
    // Aligned, wherever it is.
    let mut space = vec![0_u8; 3 * 4096];
    let start = space.as_ptr().align_offset(4096);
    let block = &mut space[start..start + 4096];
    direct.read_exact_at(block, 4096).unwrap();
    assert!(block.iter().all(|byte| *byte == b'a'));
    block.fill(b'b');
    direct.write_all_at(block, 0).unwrap();
    let text = fs::read_to_string(&path).unwrap();
    assert_eq!(text, "b".repeat(4096) + &"a".repeat(4096));
    fs::write(&path, "c".repeat(4096)).unwrap();
    direct.read_exact_at(block, 0).unwrap();
    assert!(block.iter().all(|byte| *byte == b'c'));
}

pub fn everything_is_synced(place: &Place) {
    let file = filled(place);
    file.sync_all().unwrap();
    fdatasync(&file).unwrap();
    syncfs(&file).unwrap();
    let dir = File::open(&place.dir).unwrap();
    dir.sync_all().unwrap();
    fdatasync(&dir).unwrap();
    for flag in [OFlags::SYNC, OFlags::DSYNC] {
        let mut options = OpenOptions::new();
        options.write(true);
        options.custom_flags(flag.bits().cast_signed());
        let file = options.open(place.at("f")).unwrap();
        file.write_all_at(b"synced", 0).unwrap();
    }
    rustix::fs::sync();
}

/// Copies this program.
fn program(place: &Place) -> std::path::PathBuf {
    let path = place.at("program");
    fs::copy(env::current_exe().unwrap(), &path).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

pub fn programs_are_run(place: &Place) {
    let path = program(place);
    // Without arguments it only complains.
    let done = Command::new(&path).output().unwrap();
    assert_eq!(done.status.code(), Some(1));
    assert!(done.stderr.starts_with(b"hull-posix: "));
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    let error = Command::new(&path).output().unwrap_err();
    assert_eq!(error.raw_os_error(), Some(Errno::ACCESS.raw_os_error()));
    let script = place.file("script", "#!/bin/sh\necho said\n");
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    let said = Command::new(&script).output().unwrap().stdout;
    assert_eq!(said, b"said\n");
}

pub fn a_running_program_is_not_written(place: &Place) {
    let path = program(place);
    place.file("lock", "");
    let mut running = crate::locks::holder(&path, &place.at("lock"));
    let error = OpenOptions::new().write(true).open(&path).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(Errno::TXTBSY.raw_os_error()));
    // Replaced it may be.
    fs::rename(place.file("new", "new"), &path).unwrap();
    running.end();
    assert_eq!(fs::read_to_string(&path).unwrap(), "new");
    // And what is open for writing does not run.
    let path = program(place);
    let _writer = append(&path);
    let error = Command::new(&path).output().unwrap_err();
    assert_eq!(error.raw_os_error(), Some(Errno::TXTBSY.raw_os_error()));
}

pub fn pipes_and_sockets_connect(place: &Place) {
    let fifo = place.at("fifo");
    mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    thread::scope(|scope| {
        let said = scope.spawn(|| fs::read_to_string(&fifo).unwrap());
        fs::write(&fifo, "through").unwrap();
        assert_eq!(said.join().unwrap(), "through");
    });
    let listener = UnixListener::bind(place.at("socket")).unwrap();
    let mut client = UnixStream::connect(place.at("socket")).unwrap();
    client.write_all(b"hello").unwrap();
    drop(client);
    let mut heard = String::new();
    let (mut server, _) = listener.accept().unwrap();
    server.read_to_string(&mut heard).unwrap();
    assert_eq!(heard, "hello");
    drop(listener);
    let error = UnixStream::connect(place.at("socket")).unwrap_err();
    assert_eq!(
        error.raw_os_error(),
        Some(Errno::CONNREFUSED.raw_os_error())
    );
}
