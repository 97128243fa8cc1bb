//! Handing every frame that comes in at one interface out at another, by traffic control.

use std::io;

use vmshim_protocol::netlink::route::RouteNetlinkMessage;
use vmshim_protocol::netlink::route::tc::{
    TcAction, TcActionAttribute, TcActionMirror, TcActionMirrorOption, TcActionOption, TcActionType,
    TcAttribute, TcFilterMatchAll, TcFilterMatchAllOption, TcHandle, TcMessage, TcMirror, TcMirrorActionType,
    TcOption,
};
use vmshim_protocol::netlink::{NLM_F_CREATE, NLM_F_EXCL, Netlink};

use super::NetworkError;
use crate::state::Redirection;

/// The handle of an ingress queueing discipline, which has one place only.
const QDISC: TcHandle = TcHandle { major: u16::MAX, minor: 0 };

/// Where filters of incoming frames hang, whether the discipline is `ingress` or `clsact`.
const FILTERS: TcHandle = TcHandle { major: u16::MAX, minor: TcHandle::MIN_INGRESS };

/// Our filter's place among others that may be there. Ours takes all frames, so who stands before it sees them first.
const PRIORITY: u32 = 0x766d;

/// `ETH_P_ALL` in network byte order.
const ALL_PROTOCOLS: u32 = 0x0300;

/// Whether somebody has put an ingress queueing discipline on the interface.
pub fn has_ingress(netlink: &mut Netlink, index: u32) -> Result<bool, NetworkError> {
    let failed = NetworkError::host("list queueing disciplines");
    let all = netlink.dump(RouteNetlinkMessage::GetQueueDiscipline(TcMessage::default())).map_err(failed)?;
    Ok(all.iter().any(|message| match message {
        RouteNetlinkMessage::NewQueueDiscipline(tc) => {
            u32::try_from(tc.header.index) == Ok(index) && tc.header.parent == TcHandle::INGRESS
        }
        _ => false,
    }))
}

/// Has frames go out at an interface without a queue.
pub fn add_no_qdisc(netlink: &mut Netlink, index: u32) -> io::Result<()> {
    let mut message = TcMessage::default();
    message.header.index = index.cast_signed();
    message.header.parent = TcHandle::ROOT;
    message.attributes.push(TcAttribute::Kind("noqueue".to_owned()));
    netlink.change(RouteNetlinkMessage::NewQueueDiscipline(message), NLM_F_CREATE | NLM_F_EXCL)
}

/// Connects an interface and its tap in both directions.
pub fn connect(
    netlink: &mut Netlink,
    name: &str,
    interface: &Redirection,
    tap: u32,
) -> Result<(), NetworkError> {
    let failed = || {
        let needed = "the kernel needs sch_ingress, cls_matchall and act_mirred";
        NetworkError::host(format!("redirect the traffic of interface {name} ({needed})"))
    };
    if interface.whole_qdisc {
        add_qdisc(netlink, interface.index).map_err(failed())?;
    }
    add_qdisc(netlink, tap).map_err(failed())?;
    // The guest's way out first, since an answer that comes back finds its way then.
    add_filter(netlink, tap, interface.index).map_err(failed())?;
    add_filter(netlink, interface.index, tap).map_err(failed())
}

/// Takes from an interface what [`connect`] has put on it. The tap's went with it.
pub fn disconnect(interface: &Redirection) -> io::Result<()> {
    let mut netlink = Netlink::open()?;
    let gone = if interface.whole_qdisc {
        netlink.change(RouteNetlinkMessage::DelQueueDiscipline(qdisc(interface.index)), 0)
    } else {
        let mut message = filter(interface.index);
        message.attributes.push(TcAttribute::Kind(TcFilterMatchAll::KIND.to_owned()));
        netlink.change(RouteNetlinkMessage::DelTrafficFilter(message), 0)
    };
    match gone {
        // No such interface, discipline or filter: it has been undone before, or was never done.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ENOENT | libc::EINVAL)) => {
            Ok(())
        }
        other => other,
    }
}

fn add_qdisc(netlink: &mut Netlink, index: u32) -> io::Result<()> {
    let mut message = qdisc(index);
    message.attributes.push(TcAttribute::Kind("ingress".to_owned()));
    netlink.change(RouteNetlinkMessage::NewQueueDiscipline(message), NLM_F_CREATE | NLM_F_EXCL)
}

fn add_filter(netlink: &mut Netlink, from: u32, to: u32) -> io::Result<()> {
    let mut mirror = TcMirror::default();
    mirror.generic.action = TcActionType::Stolen;
    mirror.eaction = TcMirrorActionType::EgressRedir;
    mirror.ifindex = to;
    let mut action = TcAction::default();
    action.attributes = vec![
        TcActionAttribute::Kind(TcActionMirror::KIND.to_owned()),
        TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror))]),
    ];
    let mut message = filter(from);
    message.attributes = vec![
        TcAttribute::Kind(TcFilterMatchAll::KIND.to_owned()),
        TcAttribute::Options(vec![TcOption::MatchAll(TcFilterMatchAllOption::Action(vec![action]))]),
    ];
    netlink.change(RouteNetlinkMessage::NewTrafficFilter(message), NLM_F_CREATE | NLM_F_EXCL)
}

fn qdisc(index: u32) -> TcMessage {
    let mut message = TcMessage::default();
    // Indices are positive numbers that fit either type.
    message.header.index = index.cast_signed();
    message.header.handle = QDISC;
    message.header.parent = TcHandle::INGRESS;
    message
}

fn filter(index: u32) -> TcMessage {
    let mut message = TcMessage::default();
    message.header.index = index.cast_signed();
    message.header.parent = FILTERS;
    message.header.info = PRIORITY << 16 | ALL_PROTOCOLS;
    message
}
