//! Images that come in archives and leave in them.
#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Cursor, Read, Write};
use std::sync::{Arc, Mutex};

use common::faulty::Faulty;
use common::{Blob, Flavor, Packing, TestImage, TestStore, digest, layer, noise};
use hull_image::{ImageId, PullError, PullProgress, StoreError};
use serde_json::{Value, json};
use tokio::sync::watch;

const NAME: &str = "registry.example/team/app:1";

fn image(packing: Packing) -> TestImage {
    let upper = layer(&[("own", b"1"), ("etc/.wh.os", b""), ("empty", b"")]);
    let base = layer(&[("base", &noise(400_000, 1)), ("etc/os", b"hull")]);
    TestImage::new(Flavor::Oci, &[(base, packing), (upper, packing)])
}

/// An archive in the making; files in the order given.
#[derive(Default)]
struct Archive(Vec<(String, Vec<u8>)>);

impl Archive {
    fn file(mut self, name: &str, bytes: &[u8]) -> Self {
        self.0.push((name.into(), bytes.to_vec()));
        self
    }

    fn blob(self, blob: &Blob) -> Self {
        self.file(&blob_path(&blob.digest()), &blob.bytes)
    }

    /// The files of an OCI layout with one image.
    fn layout(image: &TestImage, annotations: &Value) -> Self {
        let mut manifest = image.manifest.descriptor();
        manifest["annotations"] = annotations.clone();
        Self::default()
            .file("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)
            .blobs(image)
            .index(&[manifest])
    }

    fn blobs(self, image: &TestImage) -> Self {
        let small = self.blob(&image.config).blob(&image.manifest);
        image.layers.iter().fold(small, Self::blob)
    }

    fn index(self, manifests: &[Value]) -> Self {
        let index = json!({"schemaVersion": 2, "manifests": manifests});
        self.file("index.json", index.to_string().as_bytes())
    }

    fn without(mut self, name: &str) -> Self {
        let before = self.0.len();
        self.0.retain(|(known, _)| known != name);
        assert_ne!(self.0.len(), before, "{name}");
        self
    }

    fn change(mut self, name: &str, change: impl FnOnce(&mut Vec<u8>)) -> Self {
        let file = self.0.iter_mut().find(|(known, _)| known == name);
        change(&mut file.unwrap().1);
        self
    }

    fn bytes(&self) -> Vec<u8> {
        let files: Vec<(&str, &[u8])> = self.0.iter().map(|(n, b)| (&**n, &**b)).collect();
        layer(&files)
    }
}

fn blob_path(digest: &str) -> String {
    format!("blobs/{}", digest.replace(':', "/"))
}

fn named() -> Value {
    json!({"io.containerd.image.name": NAME})
}

async fn import(
    test: &TestStore,
    archive: Vec<u8>,
    name: Option<&str>,
) -> Result<Vec<ImageId>, PullError> {
    let progress = watch::Sender::new(PullProgress::default());
    test.store
        .import(Cursor::new(archive), name, &progress)
        .await
}

/// What an import of the archive into an empty store is refused with; nothing stays then.
async fn refused(archive: Vec<u8>, name: Option<&str>) -> PullError {
    let test = TestStore::with(None, |limits| {
        limits.max_archive_bytes = 2 << 20;
        limits.max_unpacked_bytes = 8 << 20;
    })
    .await;
    let error = import(&test, archive, name).await.unwrap_err();
    assert_eq!(test.leftovers(), [""; 0]);
    assert!(test.store.list().await.unwrap().is_empty());
    error
}

#[derive(Clone, Default)]
struct Shared(Arc<Mutex<Vec<u8>>>);

impl Write for Shared {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

async fn export(test: &TestStore, names: &[&str]) -> Result<Vec<u8>, StoreError> {
    let out = Shared::default();
    let names: Vec<String> = names.iter().map(ToString::to_string).collect();
    test.store.export(&names, out.clone()).await?;
    let bytes = std::mem::take(&mut *out.0.lock().unwrap());
    Ok(bytes)
}

/// The files of an archive; each may be there once.
fn files(archive: &[u8]) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in tar::Archive::new(archive).entries().unwrap() {
        let mut entry = entry.unwrap();
        let path = entry.path().unwrap().to_str().unwrap().to_owned();
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).unwrap();
        assert!(files.insert(path.clone(), bytes).is_none(), "{path} twice");
    }
    files
}

/// All of the image's device.
async fn device(test: &TestStore, id: &ImageId) -> Vec<u8> {
    let path = test.directory.path().join("device");
    test.device(id.as_str(), &path).await;
    fs::read(path).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_exported_is_the_same_image_wherever_it_is_imported() {
    let faulty = Faulty::start().await;
    let here = TestStore::open().await;
    let mut ids = Vec::new();
    let mut names = Vec::new();
    for (tag, packing) in [("gzip", Packing::Gzip), ("zstd", Packing::Zstd)] {
        // The same layers, and another configuration.
        let mut image = image(packing);
        image.config.bytes.extend(vec![b' '; tag.len() + ids.len()]);
        let image = TestImage::from_parts(Flavor::Oci, image.config.bytes, image.layers);
        faulty.put("team/app", tag, &image);
        let name = format!("{}/team/app:{tag}", faulty.address());
        let id = here.store.pull(&name, None).await.unwrap();
        assert_eq!(id.as_str(), image.id());
        ids.push(id);
        names.push(name);
    }
    let archive = export(&here, &[&names[0], ids[1].as_str(), ids[0].as_str()]).await;
    let archive = archive.unwrap();
    let found = files(&archive);
    // What is in a blob is what its name says; the layers, which both images have, are there once.
    let blobs: Vec<_> = found
        .iter()
        .filter(|(path, _)| path.starts_with("blobs/"))
        .collect();
    assert_eq!(blobs.len(), 2 + 2 + 2);
    for (path, bytes) in blobs {
        assert_eq!(*path, blob_path(&digest(bytes)));
    }
    let saved: Value = serde_json::from_slice(&found["manifest.json"]).unwrap();
    assert_eq!(saved[0]["RepoTags"], json!([names[0]]));
    assert_eq!(saved[1]["Config"], blob_path(ids[1].as_str()));
    for path in saved[0]["Layers"].as_array().unwrap() {
        assert!(found.contains_key(path.as_str().unwrap()), "{path}");
    }

    let there = TestStore::open().await;
    let mut imported = import(&there, archive.clone(), None).await.unwrap();
    imported.sort();
    ids.sort();
    assert_eq!(imported, ids);
    for id in &ids {
        let (ours, theirs) = (here.store.get(id.as_str()), there.store.get(id.as_str()));
        let (ours, theirs) = (ours.await.unwrap().unwrap(), theirs.await.unwrap().unwrap());
        assert_eq!(ours.repo_tags, theirs.repo_tags);
        assert_eq!(ours.config, theirs.config);
        assert_eq!(device(&here, id).await, device(&there, id).await);
    }
    assert_eq!(there.leftovers(), here.leftovers());
    // Out again it is the same archive, byte by byte, and in again it changes nothing.
    let again = export(&there, &[&names[0], ids[0].as_str(), ids[1].as_str()]).await;
    assert_eq!(files(&again.unwrap()).len(), found.len());
    import(&there, archive, None).await.unwrap();
    assert_eq!(there.leftovers(), here.leftovers());
    assert_eq!(there.store.list().await.unwrap().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn layouts_of_all_writers_are_read() {
    let image = image(Packing::Gzip);
    let layout = Archive::layout(&image, &named());
    let reversed = Archive(layout.0.iter().rev().cloned().collect());
    let dotted = layout.0.iter().map(|(n, b)| (format!("./{n}"), b.clone()));
    let packed = |bytes: Vec<u8>| zstd::encode_all(&bytes[..], 1).unwrap();
    let by_ref_name = json!({"org.opencontainers.image.ref.name": NAME});
    let tag_only = json!({"org.opencontainers.image.ref.name": "1"});
    let index = image.index(Flavor::Oci);
    let mut through_index = index.descriptor();
    through_index["annotations"] = named();
    let other = |arch: &str| {
        json!({
            "mediaType": "application/vnd.oci.image.manifest.v1+json", "size": 3,
            "digest": digest(arch.as_bytes()), "annotations": named(),
            "platform": {"os": "linux", "architecture": arch},
        })
    };
    let mut own = other("amd64");
    own["digest"] = json!(image.manifest.digest());
    let platforms = [other("arm64"), own, other("s390x")];
    let empty = || Archive::default().file("oci-layout", br#"{"imageLayoutVersion":"1.1.0"}"#);
    let cases = [
        ("index last", layout.bytes(), None),
        ("index first", reversed.bytes(), None),
        ("dotted names", Archive(dotted.collect()).bytes(), None),
        ("compressed", packed(layout.bytes()), None),
        (
            "name of podman",
            Archive::layout(&image, &by_ref_name).bytes(),
            None,
        ),
        (
            "name of skopeo",
            Archive::layout(&image, &tag_only).bytes(),
            Some(NAME),
        ),
        (
            "no name",
            Archive::layout(&image, &Value::Null).bytes(),
            Some(NAME),
        ),
        (
            "an index of platforms",
            empty()
                .blobs(&image)
                .blob(&index)
                .index(&[through_index])
                .bytes(),
            None,
        ),
        (
            "platforms side by side, the others not there",
            empty().blobs(&image).index(&platforms).bytes(),
            None,
        ),
    ];
    for (what, archive, name) in cases {
        let test = TestStore::open().await;
        let ids = import(&test, archive, name).await;
        let ids = ids.unwrap_or_else(|e| panic!("{what}: {e:?}"));
        assert_eq!(ids.len(), 1, "{what}");
        assert_eq!(ids[0].as_str(), image.id(), "{what}");
        let seen = test.store.get(NAME).await.unwrap().unwrap();
        assert_eq!(seen.repo_tags, [NAME], "{what}");
        assert_eq!(seen.repo_digests.len(), 1, "{what}");
        assert_eq!(test.leftovers().len(), 3, "{what}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_docker_save_writes_is_read() {
    let image = TestImage::new(
        Flavor::Docker,
        &[
            (layer(&[("a", b"1")]), Packing::Plain),
            (layer(&[("b", b"2")]), Packing::Gzip),
            (layer(&[("a", b"1")]), Packing::Plain),
        ],
    );
    let config = format!("{}.json", &image.id()[7..]);
    let saved = |tags: Value| {
        json!([{
            "Config": config, "RepoTags": tags,
            "Layers": ["one/layer.tar", "two/layer.tar", "three/layer.tar"],
        }])
    };
    let archive = |saved: &Value, flag: tar::EntryType, target: &str| {
        let mut tar = tar::Builder::new(Vec::new());
        let mut add = |path: &str, bytes: &[u8]| {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            tar.append_data(&mut header, path, bytes).unwrap();
        };
        add(&config, &image.config.bytes);
        add("one/layer.tar", &image.layers[0].bytes);
        add("one/VERSION", b"1.0");
        add("two/layer.tar", &image.layers[1].bytes);
        add("manifest.json", saved.to_string().as_bytes());
        // It names a layer that is there already by a link.
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(flag);
        header.set_size(0);
        tar.append_link(&mut header, "three/layer.tar", target)
            .unwrap();
        tar.into_inner().unwrap()
    };
    let tags = json!(["registry.example/team/app:1", "app:2"]);
    for (flag, target) in [
        (tar::EntryType::Symlink, "../one/layer.tar"),
        (tar::EntryType::Link, "one/layer.tar"),
    ] {
        let test = TestStore::open().await;
        let ids = import(&test, archive(&saved(tags.clone()), flag, target), None).await;
        assert_eq!(ids.unwrap()[0].as_str(), image.id());
        let seen = test.store.get(&image.id()).await.unwrap().unwrap();
        let expected = ["docker.io/library/app:2", NAME];
        assert_eq!(seen.repo_tags, expected);
        // And out again, in the newer form.
        let exported = export(&test, &[&image.id()]).await.unwrap();
        let there = TestStore::open().await;
        let ids = import(&there, exported, None).await.unwrap();
        // One image by two names.
        assert!(ids.iter().all(|id| id.as_str() == image.id()), "{ids:?}");
        let seen = there.store.get(&image.id()).await.unwrap().unwrap();
        assert_eq!(seen.repo_tags, expected);
    }
    let unnamed = archive(&saved(Value::Null), tar::EntryType::Link, "one/layer.tar");
    let error = refused(unnamed.clone(), None).await.to_string();
    assert!(error.contains("give it a name"), "{error}");
    let test = TestStore::open().await;
    import(&test, unnamed, Some(NAME)).await.unwrap();
    assert!(test.store.get(NAME).await.unwrap().is_some());
    // Links that lead round, out, or nowhere.
    for (target, expected) in [
        ("../three/layer.tar", "lead to each other"),
        ("../../../etc/passwd", "leaves the root"),
        ("../four/layer.tar", "not found"),
    ] {
        let archive = archive(&saved(tags.clone()), tar::EntryType::Symlink, target);
        let error = refused(archive, None).await.to_string();
        assert!(error.contains(expected), "{target}: {error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_blob_of_an_archive_is_held_against_its_digest() {
    let image = image(Packing::Gzip);
    let layout = || Archive::layout(&image, &named());
    let flip = |bytes: &mut Vec<u8>| {
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
    };
    let path = |blob: &Blob| blob_path(&blob.digest());
    for blob in [
        &image.manifest,
        &image.config,
        &image.layers[0],
        &image.layers[1],
    ] {
        let error = refused(layout().change(&path(blob), flip).bytes(), None).await;
        assert!(
            matches!(error, PullError::DigestMismatch { .. }),
            "{error:?}"
        );
        let error = refused(layout().without(&path(blob)).bytes(), None).await;
        assert!(matches!(error, PullError::NotFound { .. }), "{error:?}");
        let longer = |bytes: &mut Vec<u8>| bytes.extend([0; 600]);
        let error = refused(layout().change(&path(blob), longer).bytes(), None).await;
        assert!(
            matches!(error, PullError::DigestMismatch { .. }),
            "{error:?}"
        );
    }
    // A layer that is what the manifest says and not what the configuration says.
    let mut wrong = image.clone();
    wrong.layers[1] = Blob {
        bytes: layer(&[("evil", b"1")]),
        media_type: "application/vnd.oci.image.layer.v1.tar".into(),
    };
    let wrong = TestImage::from_parts(Flavor::Oci, wrong.config.bytes, wrong.layers);
    let error = refused(Archive::layout(&wrong, &named()).bytes(), None).await;
    assert!(
        matches!(error, PullError::DigestMismatch { .. }),
        "{error:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn archives_that_are_none_are_refused_and_say_why() {
    let image = image(Packing::Gzip);
    let layout = || Archive::layout(&image, &named());
    let with_index = |manifests: &[Value]| {
        Archive::default()
            .file("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)
            .index(manifests)
            .bytes()
    };
    let text = |text: &str| {
        let text = text.to_owned();
        move |bytes: &mut Vec<u8>| *bytes = text.into_bytes()
    };
    let bad_name = json!({"io.containerd.image.name": "../../etc/passwd"});
    let two = [
        {
            let mut one = image.manifest.descriptor();
            one["annotations"] = named();
            one
        },
        {
            let mut two = image.manifest.descriptor();
            two["annotations"] = json!({"io.containerd.image.name": "other:1"});
            two
        },
    ];
    let many = (0..70_000).fold(Archive::default(), |archive, number| {
        archive.file(&number.to_string(), b"")
    });
    let long = format!("{}/{}", "d".repeat(250), "n".repeat(250));
    let names = (0..20_000).fold(Archive::default(), |archive, number| {
        archive.file(&format!("{long}{number}"), b"")
    });
    let bomb = zstd::encode_all(&layout().file("zeros", &vec![0; 4 << 20]).bytes()[..], 3);
    for (what, archive, name, expected) in [
        ("nothing", Vec::new(), None, "neither an OCI image layout"),
        ("noise", noise(5000, 3), None, "checksum"),
        (
            "another archive",
            layer(&[("etc/passwd", b"x")]),
            None,
            "neither an OCI",
        ),
        (
            "no index",
            layout().without("index.json").bytes(),
            None,
            "has no index.json",
        ),
        (
            "no layout",
            layout().without("oci-layout").bytes(),
            None,
            "neither an OCI",
        ),
        ("no image", with_index(&[]), None, "has no image"),
        (
            "another layout",
            layout()
                .change("oci-layout", text(r#"{"imageLayoutVersion":"2.0"}"#))
                .bytes(),
            None,
            "unknown layout",
        ),
        (
            "a broken index",
            layout().change("index.json", text("{")).bytes(),
            None,
            "broken index.json",
        ),
        (
            "an index that is no small document",
            layout()
                .change("index.json", text(&" ".repeat(5 << 20)))
                .bytes(),
            None,
            "larger than the limit",
        ),
        (
            "a bad name",
            Archive::layout(&image, &bad_name).bytes(),
            None,
            "parse image reference",
        ),
        (
            "no name",
            Archive::layout(&image, &Value::Null).bytes(),
            None,
            "give it a name",
        ),
        (
            "one name for two",
            with_index(&two),
            Some("x"),
            "one name fits one",
        ),
        (
            "climbing",
            layout().file("a", b"").change("a", |_| {}).bytes(),
            Some("A B"),
            "reference",
        ),
        ("too many files", many.bytes(), None, "65536 entries"),
        ("names too long", names.bytes(), None, "bytes of names"),
        (
            "too large",
            layout().file("big", &noise(3 << 20, 4)).bytes(),
            None,
            "2097152 bytes",
        ),
        ("a bomb", bomb.unwrap(), None, "2097152 bytes"),
    ] {
        let error = refused(archive, name).await.to_string();
        assert!(error.contains(expected), "{what}: {error}");
    }
    // Names that climb; the builder itself would not write them.
    let mut climbing = layout().file("aa/passwd", b"x").bytes();
    let at = climbing.windows(9).position(|w| w == b"aa/passwd").unwrap();
    climbing[at..at + 2].copy_from_slice(b"..");
    let header = &mut climbing[at..at + 512];
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|b| u32::from(*b)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let error = refused(climbing, None).await.to_string();
    assert!(error.contains("leaves the root"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_archive_that_is_cut_short_leaves_nothing() {
    let image = image(Packing::Zstd);
    let archive = Archive::layout(&image, &named()).bytes();
    // Without the index at its end there is nothing to take in, wherever it was cut.
    let index = archive.len() - 2048;
    for length in [1, 511, 512, 700, 5000, index / 2, index - 1] {
        refused(archive[..length].to_vec(), None).await;
    }
    // A source that fails is told, too.
    struct Failing(Cursor<Vec<u8>>);
    impl Read for Failing {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            match self.0.read(buffer)? {
                0 => Err(io::Error::other("the cable was cut")),
                count => Ok(count),
            }
        }
    }
    let test = TestStore::open().await;
    let failing = Failing(Cursor::new(archive[..index].to_vec()));
    let progress = watch::Sender::new(PullProgress::default());
    let error = test.store.import(failing, None, &progress).await;
    let error = error.unwrap_err().to_string();
    assert!(error.contains("the cable was cut"), "{error}");
    assert_eq!(test.leftovers(), [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_of_an_archive_is_unpacked_as_one_from_a_registry() {
    // What the unpacker refuses in a pull it refuses here, for the same reason.
    let unpacked = |tar: Vec<u8>| TestImage::new(Flavor::Oci, &[(tar, Packing::Gzip)]);
    let mut climbing = layer(&[("aa/passwd", b"x")]);
    climbing[..2].copy_from_slice(b"..");
    climbing[148..156].fill(b' ');
    let sum: u32 = climbing[..512].iter().map(|b| u32::from(*b)).sum();
    climbing[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let error = refused(Archive::layout(&unpacked(climbing), &named()).bytes(), None).await;
    assert!(matches!(error, PullError::CorruptLayer { .. }), "{error:?}");
    let bomb = unpacked(layer(&[("zeros", &vec![0; 16 << 20])]));
    let error = refused(Archive::layout(&bomb, &named()).bytes(), None).await;
    assert!(matches!(error, PullError::TooLarge { .. }), "{error:?}");
    // A layer that is here already has to be in the archive too: it may name any.
    let image = image(Packing::Gzip);
    let test = TestStore::open().await;
    import(&test, Archive::layout(&image, &named()).bytes(), None)
        .await
        .unwrap();
    let thin = image.layers.iter().fold(
        Archive::layout(&image, &json!({"io.containerd.image.name": "thin:1"})),
        |archive, blob| archive.without(&blob_path(&blob.digest())),
    );
    let error = import(&test, thin.bytes(), None).await.unwrap_err();
    assert!(matches!(error, PullError::NotFound { .. }), "{error:?}");
    assert!(test.store.get("thin:1").await.unwrap().is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_of_damaged_files_fails() {
    let image = image(Packing::Gzip);
    let archive = Archive::layout(&image, &named()).bytes();
    let diff_ids: Value = serde_json::from_slice(&image.config.bytes).unwrap();
    let base = diff_ids["rootfs"]["diff_ids"][0]
        .as_str()
        .unwrap()
        .replace(':', "-");
    for damage in ["data changed", "data cut", "recipe changed", "recipe gone"] {
        let test = TestStore::open().await;
        import(&test, archive.clone(), None).await.unwrap();
        let (file, what) = damage.split_once(' ').unwrap();
        let path = test
            .directory
            .path()
            .join("images/layers")
            .join(&base)
            .join(file);
        let mut bytes = fs::read(&path).unwrap();
        match what {
            "changed" => {
                let middle = bytes.len() / 2;
                bytes[middle] ^= 1;
            }
            _ => bytes.truncate(bytes.len() / 2),
        }
        fs::write(&path, bytes).unwrap();
        if what == "gone" {
            fs::remove_file(&path).unwrap();
        }
        let error = export(&test, &[NAME]).await.unwrap_err();
        assert!(
            matches!(error, StoreError::Io { .. }),
            "{damage}: {error:?}"
        );
    }
    let test = TestStore::open().await;
    let error = export(&test, &["absent:1"]).await.unwrap_err();
    assert!(matches!(error, StoreError::NotFound(_)), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_is_removed_meanwhile_is_exported_whole() {
    let image = image(Packing::Gzip);
    let test = TestStore::open().await;
    import(&test, Archive::layout(&image, &named()).bytes(), None)
        .await
        .unwrap();
    /// Waits at its first byte until it may go on.
    struct Waiting(
        Option<(std::sync::mpsc::Sender<()>, std::sync::mpsc::Receiver<()>)>,
        Shared,
    );
    impl Write for Waiting {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if let Some((begun, go_on)) = self.0.take() {
                begun.send(()).unwrap();
                go_on.recv().unwrap();
            }
            self.1.write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let (begun, has_begun) = std::sync::mpsc::channel();
    let (go_on, may_go_on) = std::sync::mpsc::channel();
    let out = Shared::default();
    let writer = Waiting(Some((begun, may_go_on)), out.clone());
    let store = test.store.clone();
    let export = tokio::spawn(async move { store.export(&[NAME.to_owned()], writer).await });
    tokio::task::spawn_blocking(move || has_begun.recv().unwrap())
        .await
        .unwrap();
    test.store.remove(NAME).await.unwrap();
    assert_eq!(test.leftovers().len(), 3);
    go_on.send(()).unwrap();
    export.await.unwrap().unwrap();
    assert_eq!(test.leftovers(), [""; 0]);
    let bytes = std::mem::take(&mut *out.0.lock().unwrap());
    assert_eq!(
        import(&test, bytes, None).await.unwrap()[0].as_str(),
        image.id()
    );
}
