//! The commands against a daemon of their own, as far as no VM is needed.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use sha2::{Digest, Sha256};
use tempfile::TempDir;

use super::*;
use crate::{client::Daemon, config::Flags};

const NAME: &str = "registry.example/app:1";

fn settings(directory: &TempDir) -> Settings {
    let path = |name: &str| Some(directory.path().join(name));
    let config = directory.path().join("config.toml");
    let own = directory.path().display();
    let text = format!(
        "[cni]\nconf_dir = '{own}/cni'\nbin_dirs = ['{own}/bin']\n\
         [registries]\nconfig_dir = '{own}/certs.d'\n"
    );
    fs::write(&config, text).unwrap();
    let mut settings = Settings::load(&Flags {
        config: Some(config),
        root: path("root"),
        state: path("state"),
        assets: path("assets"),
        ..Flags::default()
    })
    .unwrap();
    settings.images.workers.program = hull();
    settings
}

/// The program that this is a part of: the one that runs is a test, and no worker.
fn hull() -> PathBuf {
    // <target>/debug/deps/<this test>
    let mut hull = std::env::current_exe().unwrap();
    hull.pop();
    hull.set_file_name("hull");
    assert!(hull.exists(), "no {}: cargo build", hull.display());
    hull
}

async fn node() -> (TempDir, Daemon) {
    let directory = tempfile::tempdir().unwrap();
    let daemon = client::connect(settings(&directory)).await.unwrap();
    (directory, daemon)
}

fn digest(bytes: &[u8]) -> String {
    let hex = Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect::<String>();
    format!("sha256:{hex}")
}

fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (path, contents) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(contents.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, path, *contents).unwrap();
    }
    tar.into_inner().unwrap()
}

/// What `docker save` would write of an image with one layer; and the image's id.
fn saved(content: &[u8]) -> (Vec<u8>, String) {
    let layer = tar(&[("file", content)]);
    let diff_id = digest(&layer);
    let config = serde_json::json!({
        "architecture": "amd64", "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [diff_id]},
    })
    .to_string();
    let manifest = serde_json::json!([{
        "Config": "config.json", "RepoTags": [NAME], "Layers": ["layer.tar"],
    }]);
    let archive = tar(&[
        ("layer.tar", &layer),
        ("config.json", config.as_bytes()),
        ("manifest.json", manifest.to_string().as_bytes()),
    ]);
    let id = digest(config.as_bytes());
    (archive, id)
}

async fn import(client: &Client, file: &Path) -> Result<Vec<String>> {
    transfer::import(client, file, String::new(), Show::Nothing).await
}

fn make_pipe(path: &Path) {
    nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).unwrap();
}

fn names_in(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name());
    names
        .map(|name| name.to_string_lossy().into_owned())
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_goes_from_node_to_node_in_a_file() {
    let (archive, id) = saved(&vec![7; 3 << 20]);
    let (here, daemon) = node().await;
    let file = here.path().join("saved.tar");
    fs::write(&file, archive).unwrap();
    let client = daemon.client();
    assert_eq!(import(&client, &file).await.unwrap(), [id.as_str()]);
    let exports = here.path().join("exports");
    fs::create_dir(&exports).unwrap();
    let exported = exports.join("exported.tar");
    for name in [NAME, id.as_str()] {
        let names = vec![name.to_owned()];
        transfer::export(&client, names, &exported).await.unwrap();
    }
    assert_eq!(names_in(&exports), ["exported.tar"]);

    let (_there, other) = node().await;
    assert_eq!(
        import(&other.client(), &exported).await.unwrap(),
        [id.as_str()]
    );
    let listed = list(&other.client(), false).await.unwrap();
    assert_eq!((listed.len(), &listed[0].id), (1, &id));
    assert_eq!(listed[0].tags, [NAME]);
    assert_eq!(listed[0].containers, 0);
    other.close().await;

    // What can't be exported leaves no file, and what was there before.
    let before = fs::read(&exported).unwrap();
    let absent = vec![NAME.to_owned(), "absent:1".to_owned()];
    let error = transfer::export(&client, absent, &exported).await;
    let error = error.unwrap_err().to_string();
    assert!(error.contains("not found"), "{error}");
    assert_eq!(names_in(&exports), ["exported.tar"]);
    assert!(fs::read(&exported).unwrap() == before);

    assert_eq!(remove(&client, NAME.into()).await.unwrap(), 0);
    let error = remove(&client, NAME.into()).await.unwrap_err().to_string();
    assert!(error.contains("not found"), "{error}");
    drop(client);
    daemon.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_replaces_files_and_fills_what_is_none() {
    let (directory, daemon) = node().await;
    let client = daemon.client();
    let path = |name: &str| directory.path().join(name);
    let (archive, id) = saved(&vec![7; 3 << 20]);
    fs::write(path("saved.tar"), archive).unwrap();
    import(&client, &path("saved.tar")).await.unwrap();
    let export = |to: PathBuf| {
        let (client, id) = (client.clone(), id.clone());
        async move { transfer::export(&client, vec![id], &to).await.unwrap() }
    };
    export(path("file")).await;
    let whole = fs::read(path("file")).unwrap();
    assert!(whole.len() > 3 << 20);

    fs::write(path("old"), "old").unwrap();
    std::os::unix::fs::symlink("old", path("link")).unwrap();
    export(path("link")).await;
    assert!(fs::symlink_metadata(path("link")).unwrap().is_symlink());
    assert!(fs::read(path("old")).unwrap() == whole);

    let pipe = path("pipe");
    make_pipe(&pipe);
    let reader = std::thread::spawn({
        let pipe = pipe.clone();
        move || fs::read(pipe).unwrap()
    });
    export(pipe.clone()).await;
    assert!(reader.join().unwrap() == whole);
    assert!(!fs::symlink_metadata(pipe).unwrap().is_file());
    drop(client);
    daemon.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_imported_is_told() {
    let (directory, daemon) = node().await;
    let client = daemon.client();
    let file = directory.path().join("archive.tar");
    let (archive, _) = saved(b"x");
    for (content, expected) in [
        (&b"nonsense"[..], "archive"),
        (b"", "neither an OCI image layout"),
        (&archive[..2000], "archive"),
    ] {
        fs::write(&file, content).unwrap();
        let error = import(&client, &file).await.unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    // A directory opens, and cannot be read.
    let error = import(&client, directory.path()).await.unwrap_err();
    assert!(error.to_string().contains("read the archive"), "{error}");
    let error = import(&client, Path::new("/nonexistent"))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("/nonexistent"), "{error}");
    let request = PullRequest {
        image: "not a name".into(),
        ..Default::default()
    };
    let error = progress::pull(&client, request, Show::Nothing).await;
    let error = error.unwrap_err().to_string();
    assert!(error.contains("not a name"), "{error}");
    // What ends with a client ends a moment later.
    let begin = Instant::now();
    while !names_in(&directory.path().join("root/images/tmp")).is_empty() {
        assert!(begin.elapsed() < Duration::from_secs(10), "it stays");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    drop(client);
    daemon.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_import_that_is_given_up_leaves_nothing() {
    let (directory, daemon) = node().await;
    let temporary = directory.path().join("root/images/tmp");
    let (archive, _) = saved(&vec![7; 3 << 20]);
    let pipe = directory.path().join("pipe");
    make_pipe(&pipe);
    let call = tokio::spawn({
        let (client, pipe) = (daemon.client(), pipe.clone());
        async move { import(&client, &pipe).await }
    });
    // Most of it, and then no more.
    let write = move || {
        let mut pipe = fs::File::options().write(true).open(pipe).unwrap();
        pipe.write_all(&archive[..archive.len() - 4096]).unwrap();
        pipe
    };
    let pipe = tokio::task::spawn_blocking(write).await.unwrap();
    while names_in(&temporary).is_empty() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    call.abort();
    let begin = Instant::now();
    while !names_in(&temporary).is_empty() {
        assert!(begin.elapsed() < Duration::from_secs(60));
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(list(&daemon.client(), true).await.unwrap().is_empty());
    drop(pipe);
    daemon.close().await;
}

#[test]
fn a_secret_is_read_as_what_it_is() {
    use clap::{FromArgMatches, Subcommand};
    let parse = |arguments: &[&str]| {
        let command = ImagesCommand::augment_subcommands(clap::Command::new("images"));
        let words = ["images", "pull", "x"].iter().chain(arguments);
        let matches = command.try_get_matches_from(words)?;
        let ImagesCommand::Pull(asked) = ImagesCommand::from_arg_matches(&matches)? else {
            panic!("not a pull")
        };
        Ok::<_, clap::Error>(asked.credentials)
    };
    let of = |arguments: &[&str]| {
        let request = parse(arguments).unwrap();
        let request = request.request("x".into(), &b"secret\r\n"[..]).unwrap();
        [
            request.username,
            request.password,
            request.identity_token,
            request.registry_token,
        ]
    };
    assert_eq!(of(&[]), ["", "", "", ""]);
    let user = ["--user", "me", "--password-stdin"];
    assert_eq!(of(&user), ["me", "secret", "", ""]);
    assert_eq!(of(&["--identity-token-stdin"]), ["", "", "secret", ""]);
    assert_eq!(of(&["--registry-token-stdin"]), ["", "", "", "secret"]);
    for contradiction in [
        &["--user", "me"][..],
        &["--password-stdin"],
        &["--identity-token-stdin", "--registry-token-stdin"],
        &[user[0], user[1], user[2], "--registry-token-stdin"],
        &[user[0], user[1], "--identity-token-stdin"],
    ] {
        assert!(parse(contradiction).is_err(), "{contradiction:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_store_has_one_owner() {
    let (directory, daemon) = node().await;
    // It serves a socket of its own, so this one does not find it, and may not start.
    let error = client::connect(settings(&directory)).await.unwrap_err();
    let error = format!("{error:#}");
    assert!(error.contains("another hull"), "{error}");
    daemon.close().await;
    client::connect(settings(&directory))
        .await
        .unwrap()
        .close()
        .await;
}
