//! What a container finds in its file system beyond its image: image volumes and devices.

use std::{fs, path::PathBuf, process::Command};

use hull_proto_cri::v1::{
    CdiDevice, ContainerConfig, Device, ImageSpec, ImageStatusRequest, Mount, RemoveImageRequest,
};
use hull_tests::client::image;
use tonic::Code;

use crate::harness::{BUSYBOX, Node, Pod};

const STATIC: &str = "registry.test/demo/static:latest";
const SLEEP: &str = "sleep 1000";

async fn end(node: Node, pod: &Pod) {
    node.stop_sandbox(&pod.id).await.unwrap();
    node.remove_sandbox(&pod.id).await.unwrap();
    node.finish().await;
}

async fn run(node: &Node, pod: &Pod, config: ContainerConfig) -> String {
    let id = node.create(pod, config).await.unwrap();
    node.start_container(&id).await.unwrap();
    id
}

async fn said(node: &Node, id: &str, script: &str) -> String {
    let answer = node.exec(id, script).await;
    String::from_utf8(answer.stdout).unwrap()
}

fn volume(of: &str, sub_path: &str) -> Mount {
    Mount {
        container_path: "/mnt/volume".into(),
        readonly: true,
        image: Some(ImageSpec {
            user_specified_image: "as written".into(),
            ..image(of)
        }),
        image_sub_path: sub_path.into(),
        ..Default::default()
    }
}

#[tokio::test]
async fn an_image_can_be_a_volume() {
    let node = Node::start().await;
    let pod = node.pod("volumes").await;
    let with = |name: &str, mount: Mount| {
        let mut config = node.script(name, SLEEP);
        config.mounts = vec![mount];
        config
    };
    let absent = node
        .create(&pod, with("absent", volume(STATIC, "")))
        .await
        .unwrap_err();
    assert_eq!(absent.code(), Code::NotFound, "{absent}");
    let image_id = node.client.pull(STATIC).await.unwrap();

    let id = run(&node, &pod, with("whole", volume(STATIC, ""))).await;
    let script = "/mnt/volume/bin/busybox echo runs; touch /mnt/volume/x 2>&1; ls /mnt/volume";
    assert_eq!(
        said(&node, &id, script).await,
        "runs\ntouch: /mnt/volume/x: Read-only file system\nbin\ndev\nproc\nsys\n"
    );
    let told = node.client.container_status(&id).await.unwrap().mounts;
    assert_eq!((told.len(), &*told[0].container_path), (1, "/mnt/volume"));
    let spec = told[0].image.clone().unwrap();
    assert_eq!((&*spec.image, &*spec.image_ref), (STATIC, &*image_id));
    assert_eq!(spec.user_specified_image, "as written");

    // A directory, a file, and the container's own image, whose links stay inside of it.
    let bin = run(&node, &pod, with("bin", volume(STATIC, "bin"))).await;
    assert_eq!(said(&node, &bin, "ls /mnt/volume").await, "busybox\n");
    let page = run(&node, &pod, with("page", volume(BUSYBOX, "srv/link"))).await;
    assert_eq!(
        said(&node, &page, "cat /mnt/volume").await,
        "<h1>hello from a microVM</h1>\n"
    );

    // As kubelet asks for bindMountOptions.
    let limited = Mount {
        mount_options: vec!["noexec".into(), "nodev".into()],
        ..volume(STATIC, "")
    };
    let limited = run(&node, &pod, with("limited", limited)).await;
    let script = "/mnt/volume/bin/busybox echo runs 2>&1; grep /mnt/volume /proc/self/mountinfo";
    let told = said(&node, &limited, script).await;
    assert!(told.contains("Permission denied"), "{told}");
    assert!(told.contains("ro,nodev,noexec"), "{told}");
    let status = node.client.container_status(&limited).await.unwrap();
    assert_eq!(status.mounts[0].mount_options, ["noexec", "nodev"]);

    let mut writable = volume(STATIC, "");
    writable.readonly = false;
    for (wrong, field) in [
        (writable, "config.mounts[0].readonly"),
        (volume(STATIC, "../etc"), "config.mounts[0].image_sub_path"),
        (volume(STATIC, "/bin"), "config.mounts[0].image_sub_path"),
        (volume(STATIC, "no/such"), "no/such"),
    ] {
        let error = node.create(&pod, with("wrong", wrong)).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument, "{error}");
        assert!(error.message().contains(field), "{error}");
    }

    // It stays for who uses it, and goes with the last.
    let remove = RemoveImageRequest {
        image: Some(image(STATIC)),
    };
    node.client
        .images
        .clone()
        .remove_image(remove)
        .await
        .unwrap();
    assert_eq!(
        said(&node, &id, "/mnt/volume/bin/busybox echo still").await,
        "still\n"
    );
    node.remove_container(&id).await.unwrap();
    assert_eq!(said(&node, &bin, "ls /mnt/volume").await, "busybox\n");
    node.remove_container(&bin).await.unwrap();
    let status = ImageStatusRequest {
        image: Some(image(STATIC)),
        verbose: false,
    };
    let status = node
        .client
        .images
        .clone()
        .image_status(status)
        .await
        .unwrap();
    assert!(status.into_inner().image.is_none());
    end(node, &pod).await;
}

#[tokio::test]
async fn image_volumes_outlive_a_restart_of_the_daemon() {
    let mut node = Node::start().await;
    let pod = node.pod("restart").await;
    node.client.pull(STATIC).await.unwrap();
    let mut config = node.script("main", SLEEP);
    config.mounts = vec![volume(STATIC, "")];
    let id = run(&node, &pod, config.clone()).await;
    node.client = node.daemon.kill_and_restart().await;
    assert_eq!(
        said(&node, &id, "/mnt/volume/bin/busybox echo still").await,
        "still\n"
    );
    let told = node.client.container_status(&id).await.unwrap().mounts;
    assert!(
        told[0]
            .image
            .clone()
            .unwrap()
            .image_ref
            .starts_with("sha256:")
    );
    config.metadata.as_mut().unwrap().name = "second".into();
    let second = run(&node, &pod, config).await;
    node.remove_container(&id).await.unwrap();
    assert_eq!(
        said(&node, &second, "/mnt/volume/bin/busybox echo shared").await,
        "shared\n"
    );
    end(node, &pod).await;
}

/// A loop device over a file; detached when dropped.
struct Loop {
    device: String,
    file: PathBuf,
}

impl Loop {
    fn new(node: &Node, text: &str) -> Self {
        let file = node.dir.join("disk.img");
        let mut content = text.as_bytes().to_vec();
        content.resize(1 << 20, 0);
        fs::write(&file, content).unwrap();
        let _ = Command::new("modprobe").arg("loop").status();
        let output = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(&file)
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let device = String::from_utf8(output.stdout).unwrap().trim().to_owned();
        Self { device, file }
    }

    fn written(&self) -> String {
        Command::new("sync").status().unwrap();
        let content = fs::read(&self.file).unwrap();
        String::from_utf8_lossy(&content[..5]).into_owned()
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup")
            .args(["--detach", &self.device])
            .status();
    }
}

fn device(host_path: &str, container_path: &str, permissions: &str) -> Device {
    Device {
        container_path: container_path.into(),
        host_path: host_path.into(),
        permissions: permissions.into(),
    }
}

#[tokio::test]
async fn block_devices_of_the_host_become_disks_of_the_guest() {
    let node = Node::start().await;
    let pod = node.pod("devices").await;
    let disk = Loop::new(&node, "host!");
    let with = |name: &str, devices: Vec<Device>| {
        let mut config = node.script(name, SLEEP);
        config.devices = devices;
        config
    };
    let devices = vec![
        device(&disk.device, "/dev/xvda", "rw"),
        device("/dev/null", "/dev/own/nothing", "rw"),
        device("/dev/net/tun", "/dev/net/tun", "rwm"),
    ];
    let id = run(&node, &pod, with("writer", devices)).await;
    let script = "head -c 5 /dev/xvda; printf guest | dd of=/dev/xvda conv=notrunc,fsync 2>/dev/null; \
        echo; echo x > /dev/own/nothing && echo null; ls -l /dev/net/tun | cut -c 1; \
        ls -l /dev/xvda | cut -c 1-10; wc -c < /dev/xvda";
    assert_eq!(
        said(&node, &id, script).await,
        "host!\nnull\nc\nbrw-rw----\n1048576\n"
    );
    assert_eq!(disk.written(), "guest");
    // Another container has neither the node nor the right to make it.
    let other = run(&node, &pod, with("other", Vec::new())).await;
    let script = "ls /dev/xvda; mknod /dev/d b 253 16 && head -c 5 /dev/d";
    assert_eq!(node.exec(&other, script).await.stdout, b"");
    node.remove_container(&id).await.unwrap();

    // The device is free again, here without the right to write.
    let id = run(
        &node,
        &pod,
        with("reader", vec![device(&disk.device, "/dev/disk", "r")]),
    )
    .await;
    let script = "head -c 5 /dev/disk; echo x > /dev/disk || echo refused";
    assert_eq!(said(&node, &id, script).await, "guestrefused\n");
    node.remove_container(&id).await.unwrap();

    for (wrong, field) in [
        (
            device("/dev/ptmx", "/dev/x", "rw"),
            "config.devices[0].host_path",
        ),
        (
            device("/dev/no-such", "/dev/x", "rw"),
            "config.devices[0].host_path",
        ),
        (
            device("/etc/passwd", "/dev/x", "rw"),
            "config.devices[0].host_path",
        ),
        (
            device(&disk.device, "/etc/x", "rw"),
            "config.devices[0].container_path",
        ),
        (
            device(&disk.device, "/dev/../etc/x", "rw"),
            "config.devices[0].container_path",
        ),
        (
            device(&disk.device, "/dev/x", "rwx"),
            "config.devices[0].permissions",
        ),
    ] {
        let error = node
            .create(&pod, with("wrong", vec![wrong]))
            .await
            .unwrap_err();
        assert!(error.message().contains(field), "{error}");
    }
    let mut cdi = node.script("cdi", SLEEP);
    cdi.cdi_devices = vec![CdiDevice {
        name: "vendor.com/device=gpu0".into(),
    }];
    let error = node.create(&pod, cdi).await.unwrap_err();
    assert_eq!(error.code(), Code::Unimplemented);
    assert!(error.message().contains("config.CDI_devices"), "{error}");
    drop(disk);
    end(node, &pod).await;
}
