//! What a container may use, and has used.

use crate::cases::refused;
use crate::shim::{Shim, script, soon, spec};
use serde_json::json;
use ttrpc::Code;
use vmshim_protocol::agent::UpdateContainerRequest;
use vmshim_protocol::agent::event::Event as Happened;

/// Cases that do nothing where cgroups have no controllers.
pub const NEED_CONTROLLERS: &[&str] =
    &["memory_is_limited", "processes_are_limited", "limits_can_change", "statistics"];

pub async fn memory_is_limited(mut shim: Shim) {
    if !shim.has_controllers() {
        return println!("  skipped: no memory controller");
    }
    let mut limited = spec(&["dd", "if=/dev/zero", "of=/dev/shm/x", "bs=1M", "count=60"]);
    limited["linux"]["resources"]["memory"] = json!({"limit": 32 << 20, "swap": 32 << 20});
    let _streams = shim.create("c", &limited, false).await.unwrap();
    shim.start("c", "").await.unwrap();
    let first = shim.events.recv().await.unwrap();
    assert!(matches!(&first, Happened::OutOfMemory(oom) if oom.container_id == "c"), "{first:?}");
    assert_eq!(shim.exit("c", "").await, 137);
    shim.delete("c", "").await.unwrap();
}

pub async fn processes_are_limited(mut shim: Shim) {
    if !shim.has_controllers() {
        return println!("  skipped: no pids controller");
    }
    let mut limited = script("for i in 1 2 3 4 5 6 7 8 9; do sleep 1 & done; echo survived");
    limited["linux"]["resources"]["pids"] = json!({"limit": 5});
    let (_, _, err) = shim.sh(&limited).await;
    assert!(err.contains("fork"), "{err}");
}

pub async fn limits_can_change(mut shim: Shim) {
    if !shim.has_controllers() {
        return println!("  skipped: no controllers");
    }
    let _streams = shim.create("c", &spec(&["sleep", "100"]), false).await.unwrap();
    shim.start("c", "").await.unwrap();
    let update = |json: serde_json::Value| UpdateContainerRequest {
        container_id: "c".into(),
        resources: serde_json::to_vec(&json).unwrap(),
        ..Default::default()
    };
    let new = json!({"memory": {"limit": 64 << 20}, "pids": {"limit": 9}, "cpu": {"quota": 20000, "period": 100000},
        "devices": [{"allow": true, "access": "rwm"}]});
    shim.agent.update_container(soon(), &update(new)).await.unwrap();
    let file = |name: &str| std::fs::read_to_string(shim.cgroups.join("c").join(name)).unwrap();
    assert_eq!(file("memory.max"), "67108864\n");
    assert_eq!(file("pids.max"), "9\n");
    assert_eq!(file("cpu.max"), "20000 100000\n");
    let bad = update(json!({"memory": {"limit": "x"}}));
    assert_eq!(refused(shim.agent.update_container(soon(), &bad).await).0, Code::INVALID_ARGUMENT);
    shim.signal("c", "", 9, false).await.unwrap();
    shim.exit("c", "").await;
    shim.delete("c", "").await.unwrap();
}

pub async fn statistics(mut shim: Shim) {
    use containerd_shim_protos::cgroups_v2::metrics::Metrics;
    use protobuf::Message;
    let _streams = shim.create("c", &spec(&["sleep", "100"]), false).await.unwrap();
    shim.start("c", "").await.unwrap();
    let answer = shim.agent.stats(soon(), &shim.container("c")).await.unwrap();
    let metrics = Metrics::parse_from_bytes(&answer.metrics).unwrap();
    if shim.has_controllers() {
        assert_eq!(metrics.pids.current, 1);
        assert!(metrics.memory.usage > 0 && metrics.memory.usage_limit == u64::MAX);
        assert!(metrics.cpu.usage_usec > 0);
    }
    shim.signal("c", "", 9, false).await.unwrap();
    shim.exit("c", "").await;
    shim.delete("c", "").await.unwrap();
}
