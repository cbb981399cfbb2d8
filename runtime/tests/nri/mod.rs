//! A plugin at the NRI socket of a daemon, written against the wire and with nothing of the daemon's.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    sync::{
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, channel},
    },
    thread,
    time::Duration,
};

use hull_proto_cri::v1::*;
use hull_proto_nri::{
    self as nri, ContainerAdjustment, Hook, Hooks, PLUGIN_CONNECTION, RUNTIME_CONNECTION,
    RUNTIME_SERVICE, RegisterPluginRequest,
};
use protobuf::Message as _;
use ttrpc::proto::{MessageHeader, Request, Response};

use super::{Daemon, sandbox};

const SOCKET: &str = "nri.socket = 'DIR/nri.sock'\n";
const PATIENCE: Duration = Duration::from_secs(60);

fn write(mut stream: &UnixStream, connection: u32, mut header: MessageHeader, payload: &[u8]) {
    header.length = payload.len() as u32;
    let message = [Vec::from(header), payload.to_vec()].concat();
    let mut frame = connection.to_be_bytes().to_vec();
    frame.extend((message.len() as u32).to_be_bytes());
    frame.extend(message);
    // The daemon may have gone.
    let _ = stream.write_all(&frame);
}

/// A whole message; those of this test are in one frame or two.
fn read(mut stream: &UnixStream) -> Option<(u32, MessageHeader, Vec<u8>)> {
    let mut message = Vec::new();
    loop {
        let mut head = [0; 8];
        stream.read_exact(&mut head).ok()?;
        let connection = u32::from_be_bytes(head[..4].try_into().unwrap());
        let mut frame = vec![0; u32::from_be_bytes(head[4..].try_into().unwrap()) as usize];
        stream.read_exact(&mut frame).ok()?;
        message.extend(frame);
        let header = MessageHeader::from(&message[..10]);
        if message.len() == 10 + header.length as usize {
            return Some((connection, header, message.split_off(10)));
        }
    }
}

/// What a plugin heard: the method, and the request.
type Heard = Receiver<(String, Vec<u8>)>;

/// Registers, and answers with what `answer` says: an answer, or why not.
fn plugin(
    daemon: &Daemon,
    answer: impl Fn(&str, &[u8]) -> Result<Vec<u8>, &'static str> + Send + 'static,
) -> Heard {
    let stream = UnixStream::connect(daemon.dir.path().join("nri.sock")).unwrap();
    let register = RegisterPluginRequest {
        plugin_name: "test".into(),
        plugin_idx: "10".into(),
        ..RegisterPluginRequest::default()
    };
    let request = Request {
        service: RUNTIME_SERVICE.into(),
        method: "RegisterPlugin".into(),
        payload: register.write_to_bytes().unwrap(),
        ..Request::default()
    };
    let header = MessageHeader::new_request(1, 0);
    write(
        &stream,
        RUNTIME_CONNECTION,
        header,
        &request.write_to_bytes().unwrap(),
    );
    let (told, heard) = channel();
    thread::spawn(move || {
        while let Some((connection, header, payload)) = read(&stream) {
            if connection != PLUGIN_CONNECTION {
                continue;
            }
            let request = Request::parse_from_bytes(&payload).unwrap();
            let mut response = Response::default();
            match answer(&request.method, &request.payload) {
                Ok(payload) => response.payload = payload,
                Err(why) => {
                    let status = ttrpc::get_status(ttrpc::proto::Code::UNKNOWN, why);
                    response.status = Some(status).into();
                }
            }
            let header = MessageHeader::new_response(header.stream_id, 0);
            write(
                &stream,
                PLUGIN_CONNECTION,
                header,
                &response.write_to_bytes().unwrap(),
            );
            if told.send((request.method, request.payload)).is_err() {
                return;
            }
        }
    });
    heard
}

fn next(heard: &Heard) -> (String, Vec<u8>) {
    heard.recv_timeout(PATIENCE).unwrap()
}

fn methods(heard: &Heard, number: usize) -> Vec<String> {
    (0..number).map(|_| next(heard).0).collect()
}

async fn ended(daemon: &Daemon, container: &str) {
    let mut client = daemon.client.clone();
    let container_id = container.to_owned();
    let request = StopContainerRequest {
        container_id: container_id.clone(),
        timeout: 0,
    };
    client.stop_container(request).await.unwrap();
    let request = RemoveContainerRequest { container_id };
    client.remove_container(request).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plugin_hears_of_a_pods_life_once_and_may_refuse_it() {
    let Some(daemon) = Daemon::start_with(SOCKET).await else {
        return;
    };
    let refused = AtomicBool::new(false);
    let heard = plugin(&daemon, move |method, _| {
        if method == "RunPodSandbox" && !refused.swap(true, Ordering::SeqCst) {
            return Err("not this one");
        }
        Ok(Vec::new())
    });
    assert_eq!(methods(&heard, 2), ["Configure", "Synchronize"]);
    let request = RunPodSandboxRequest {
        config: Some(sandbox("p")),
        runtime_handler: String::new(),
    };
    let mut client = daemon.client.clone();
    let error = client.run_pod_sandbox(request).await.unwrap_err();
    let told = "NRI plugin 10-test: RunPodSandbox: not this one";
    assert!(error.message().contains(told), "{error}");
    assert_eq!(methods(&heard, 2), ["RunPodSandbox", "RemovePodSandbox"]);
    let listed = client
        .list_pod_sandbox(ListPodSandboxRequest::default())
        .await;
    assert!(listed.unwrap().into_inner().items.is_empty());
    daemon.assert_nothing_left();

    let id = daemon.run("p", None).await;
    let (method, payload) = next(&heard);
    assert_eq!(method, "RunPodSandbox");
    let told = nri::RunPodSandboxRequest::parse_from_bytes(&payload).unwrap();
    assert_eq!(
        (told.pod.id.as_str(), told.pod.name.as_str()),
        (id.as_str(), "p")
    );
    assert_eq!(told.pod.ips, [daemon.ip(&id).await]);
    for _ in 0..2 {
        let request = StopPodSandboxRequest {
            pod_sandbox_id: id.clone(),
        };
        client.stop_pod_sandbox(request).await.unwrap();
    }
    daemon.end(&id).await;
    assert_eq!(methods(&heard, 2), ["StopPodSandbox", "RemovePodSandbox"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_container_is_what_a_plugin_makes_of_it_or_refused_in_one_line() {
    let Some(daemon) = Daemon::start_with(SOCKET).await else {
        return;
    };
    let image = daemon.pulled().await;
    let heard = plugin(&daemon, |method, payload| {
        if method != "CreateContainer" {
            return Ok(Vec::new());
        }
        let asked = nri::CreateContainerRequest::parse_from_bytes(payload).unwrap();
        let mut adjust = ContainerAdjustment::default();
        if asked.container.name == "hooked" {
            let hooks = Hooks {
                poststop: vec![Hook::default()],
                ..Hooks::default()
            };
            adjust.hooks = Some(hooks).into();
        } else {
            // Below what the VM has; kubelet is told of it.
            let linux = adjust.linux.mut_or_insert_default();
            let cpu = linux
                .resources
                .mut_or_insert_default()
                .cpu
                .mut_or_insert_default();
            cpu.shares.mut_or_insert_default().value = 512;
        }
        let answer = nri::CreateContainerResponse {
            adjust: Some(adjust).into(),
            ..nri::CreateContainerResponse::default()
        };
        Ok(answer.write_to_bytes().unwrap())
    });
    assert_eq!(methods(&heard, 2), ["Configure", "Synchronize"]);
    let id = daemon.run("p", None).await;
    let container = |name: &str| CreateContainerRequest {
        pod_sandbox_id: id.clone(),
        config: Some(ContainerConfig {
            metadata: Some(ContainerMetadata {
                name: name.into(),
                attempt: 0,
            }),
            image: Some(image.clone()),
            command: vec!["wait".into()],
            ..Default::default()
        }),
        sandbox_config: Some(sandbox("p")),
    };
    let mut client = daemon.client.clone();
    let refused = client
        .create_container(container("hooked"))
        .await
        .unwrap_err();
    let told = "NRI plugin 10-test: hooks: hooks are programs of the node";
    assert!(refused.message().contains(told), "{refused}");
    let made = client.create_container(container("main")).await.unwrap();
    let container_id = made.into_inner().container_id;
    let request = ContainerStatusRequest {
        container_id: container_id.clone(),
        verbose: false,
    };
    let status = client.container_status(request).await.unwrap().into_inner();
    let limits = status.status.unwrap().resources.unwrap().linux.unwrap();
    assert_eq!(limits.cpu_shares, 512);
    let request = StartContainerRequest {
        container_id: container_id.clone(),
    };
    client.start_container(request).await.unwrap();
    ended(&daemon, &container_id).await;
    daemon.end(&id).await;
    let all = [
        "RunPodSandbox",
        "CreateContainer",
        "RemoveContainer",
        "CreateContainer",
        // Who names no events gets all of them.
        "ValidateContainerAdjustment",
        "PostCreateContainer",
        "StartContainer",
        "PostStartContainer",
        "StopContainer",
        "RemoveContainer",
        "StopPodSandbox",
        "RemovePodSandbox",
    ];
    assert_eq!(methods(&heard, all.len()), all);
}
