//! The load of pmem.sh, in a guest: reads files and prints how many microseconds that took.
//!
//!     load sequential FILE     all of it, 128 KiB at a time
//!     load random FILE COUNT   COUNT times 4 KiB, anywhere
//!     load tree DIRECTORY      all files below, each as a whole
//!     load show FILE           prints it
//!     load idle                does nothing

use std::{env, fs, fs::File, io, io::Read, os::unix::fs::FileExt, path::Path, time::Instant};

fn main() -> io::Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let start = Instant::now();
    match arguments[..] {
        ["sequential", file] => sequential(file)?,
        ["random", file, count] => random(file, count.parse().map_err(io::Error::other)?)?,
        ["tree", directory] => tree(Path::new(directory))?,
        ["show", file] => return io::copy(&mut File::open(file)?, &mut io::stdout()).map(drop),
        ["idle"] => loop {
            std::thread::park();
        },
        _ => return Err(io::ErrorKind::InvalidInput.into()),
    }
    println!("{}", start.elapsed().as_micros());
    Ok(())
}

fn sequential(file: &str) -> io::Result<()> {
    let (mut file, mut buffer) = (File::open(file)?, vec![0; 128 << 10]);
    while file.read(&mut buffer)? > 0 {}
    Ok(())
}

fn random(file: &str, count: u32) -> io::Result<()> {
    let file = File::open(file)?;
    let (pages, mut buffer) = (file.metadata()?.len() / 4096, [0; 4096]);
    // xorshift64: the same places each time.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..count {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        file.read_exact_at(&mut buffer, state % pages * 4096)?;
    }
    Ok(())
}

fn tree(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            tree(&entry.path())?;
        } else {
            fs::read(entry.path())?;
        }
    }
    Ok(())
}
