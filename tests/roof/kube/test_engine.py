"""What a Service wants, and what is done so that the host has it, without a cluster or a host (spec vpnkit 7.8)."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netstack.errors import Malformed
from portfwd.invm.ports import Port
from pyvpnkit.kube.engine import ANNOTATION, Engine, Trouble
from pyvpnkit.kube.services import Service, ServicePort, parse
from tests.roof.kube.fake_api import service


def port(
    number: int, *, ip: str = "10.96.0.1", in_port: int = 0, proto: str = "tcp", annotation: str = ANNOTATION
) -> Port:
    return Port(
        proto=proto, out_ip="0.0.0.0", out_port=number, in_ip=ip, in_port=in_port or number, annotation=annotation
    )


def balancer(name: str, *numbers: int, created: str = "1", **more: Any) -> Service:
    ports = tuple(ServicePort("TCP", number, 0) for number in numbers)
    fields = {"kind": "LoadBalancer", "cluster_ip": "10.96.0.1", **more}
    return Service(namespace="default", name=name, created=created, ports=ports, **fields)


def engine(*services: Service) -> Engine:
    made = Engine()
    made.replace(services)
    return made


def wanted(document: dict[str, Any]) -> list[str]:
    return [str(one) for one in parse(document).wanted("a", "0.0.0.0")]


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        pytest.param(
            service("s", web={"port": 80, "nodePort": 30080}),
            ["a tcp forward from 0.0.0.0:80 to 10.96.0.1:80"],
            id="a load balancer's port",
        ),
        pytest.param(
            service("s", "NodePort", web={"port": 80, "nodePort": 30080}),
            ["a tcp forward from 0.0.0.0:30080 to 10.96.0.1:80"],
            id="a node port",
        ),
        pytest.param(service("s", "NodePort", web={"port": 80, "nodePort": 0}), [], id="none given yet"),
        pytest.param(service("s", "NodePort", web={"port": 80}), [], id="none"),
        pytest.param(service("s", "ClusterIP", web={"port": 80}), [], id="within the cluster"),
        pytest.param(service("s", "ExternalName", ip="", web={"port": 80}), [], id="a name elsewhere"),
        pytest.param(service("s", ip="None", web={"port": 80}), [], id="headless"),
        pytest.param(
            service("s", a={"port": 53}, b={"port": 53, "protocol": "UDP"}, c={"port": 53, "protocol": "SCTP"}),
            ["a tcp forward from 0.0.0.0:53 to 10.96.0.1:53", "a udp forward from 0.0.0.0:53 to 10.96.0.1:53"],
            id="TCP and UDP, no SCTP",
        ),
        pytest.param(
            service("s", ip="FD00:0::1", web={"port": 80}), ["a tcp forward from 0.0.0.0:80 to fd00::1:80"], id="IPv6"
        ),
        pytest.param(service("s", web={"port": 70000}, b={"port": True}, c={"port": "80"}), [], id="no ports"),
        pytest.param({**service("s", web={"port": 80}), "spec": 5}, [], id="no spec"),
    ],
)
def test_what_a_service_wants(document: dict[str, Any], expected: list[str]) -> None:
    assert wanted(document) == expected


def test_a_service_of_another_load_balancer_is_not_ours() -> None:
    document = service("s", web={"port": 80})
    document["spec"]["loadBalancerClass"] = "example.com/metal"
    assert wanted(document) == []
    assert not parse(document).is_load_balancer


@settings(deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    "metadata spec status name namespace ports port nodePort type clusterIP loadBalancer ingress".split()
                ),
                inner,
                max_size=6,
            )
        ),
        max_leaves=20,
    )
)
def test_any_json_is_a_service_or_malformed(document: Any) -> None:
    try:
        found = parse(document)
    except Malformed:
        return
    found.wanted("a", "0.0.0.0")


def test_ports_are_opened_and_what_nobody_wants_is_closed() -> None:
    plan = engine(balancer("web", 80, 443)).plan([port(443), port(8080)])
    assert plan.close == (port(8080),)
    assert [want.port for want in plan.open] == [port(80)]
    assert plan.troubles == ()


def test_an_update_closes_what_is_absent_before_it_opens() -> None:
    made = engine(balancer("web", 80))
    made.apply(balancer("web", 80, cluster_ip="10.96.0.9"))
    plan = made.plan([port(80)])
    assert plan.close == (port(80),)
    assert [want.port for want in plan.open] == [port(80, ip="10.96.0.9")]


def test_a_deleted_service_has_its_ports_closed() -> None:
    made = engine(balancer("web", 80))
    made.delete("default/web")
    made.delete("default/never")
    assert made.plan([port(80), port(81, annotation="")]).close == (port(80),)


def test_ports_of_others_are_never_closed() -> None:
    others = [port(80, annotation=""), port(81, annotation="docker")]
    made = engine()
    assert made.plan(others).close == ()
    assert made.withdraw([*others, port(82)]) == (port(82),)


def test_a_port_that_somebody_has_is_skipped_with_words() -> None:
    plan = engine(balancer("web", 80, 81)).plan([port(80, annotation="")])
    assert [want.port.out_port for want in plan.open] == [81]
    (trouble,) = plan.troubles
    assert (trouble.service.key, trouble.reason) == ("default/web", "PortTaken")
    assert trouble.message == "tcp port 80 of the host is taken by `tcp forward from 0.0.0.0:80 to 10.96.0.1:80`"


def test_the_same_number_of_the_other_protocol_is_free() -> None:
    plan = engine(balancer("web", 80)).plan([port(80, proto="udp", annotation="")])
    assert [want.port for want in plan.open] == [port(80)]


def test_of_several_the_oldest_gets_the_port() -> None:
    old, new = balancer("z", 80, created="1"), balancer("a", 80, created="2", cluster_ip="10.96.0.2")
    for made in (engine(old, new), engine(new, old)):
        plan = made.plan([])
        assert [want.service for want in plan.open] == [old]
        (trouble,) = plan.troubles
        assert (trouble.service, trouble.message) == (new, "tcp port 80 of the host is taken by Service default/z")


def test_who_has_the_port_keeps_it() -> None:
    old, new = balancer("z", 80, created="1"), balancer("a", 80, created="2", cluster_ip="10.96.0.2")
    plan = engine(old, new).plan([port(80, ip="10.96.0.2")])
    assert (plan.close, plan.open) == ((), ())
    assert [trouble.service for trouble in plan.troubles] == [old]


def test_when_the_first_goes_the_next_gets_the_port() -> None:
    old, new = balancer("z", 80, created="1"), balancer("a", 80, created="2", cluster_ip="10.96.0.2")
    made = engine(old, new)
    made.delete(old.key)
    plan = made.plan([port(80)])
    assert plan.close == (port(80),)
    assert [want.service for want in plan.open] == [new]


def test_what_the_host_refused_waits_for_the_resync() -> None:
    made = engine(balancer("web", 80))
    (want,) = made.plan([]).open
    trouble = made.refused(want, "permission denied")
    assert (trouble.reason, trouble.message) == ("PortRefused", "the host refused tcp port 80: permission denied")
    again = made.plan([])
    assert (again.open, again.troubles) == ((), (trouble,))
    made.resync()
    assert made.plan([]).open == (want,)


def test_a_refused_service_that_wants_another_port_is_tried_at_once() -> None:
    made = engine(balancer("web", 80))
    made.refused(made.plan([]).open[0], "no")
    made.apply(balancer("web", 81))
    assert [want.port.out_port for want in made.plan([]).open] == [81]


def test_trouble_is_said_once_and_again_when_it_comes_back() -> None:
    made = engine()
    trouble = Trouble(balancer("web"), "PortTaken", "x")
    assert made.news([trouble, trouble]) == (trouble,)
    assert made.news([trouble]) == ()
    assert made.news([]) == ()
    assert made.news([trouble]) == (trouble,)


def test_a_load_balancer_with_a_port_is_told_where_it_is() -> None:
    web, told = balancer("web", 80, 81), balancer("told", 82, hostnames=("localhost",))
    node = Service(
        namespace="d", name="n", kind="NodePort", cluster_ip="10.96.0.1", ports=(ServicePort("TCP", 83, 83),)
    )
    made = engine(web, told, node)
    assert made.ingress([]) == ()
    assert made.ingress([port(81), port(82), port(83)]) == (web,)


def test_services_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyvpnkit.kube.engine.MAX_SERVICES", 2)
    made = engine(balancer("a"), balancer("b"), balancer("c"))
    made.apply(balancer("a", 80))
    assert (len(made), made.overflow) == (2, 1)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(80, 83), st.integers(1, 2)), max_size=8),
    st.lists(st.integers(80, 84)),
)
def test_a_plan_that_is_done_leaves_nothing_to_do(wants: list[tuple[str, int, int]], there: list[int]) -> None:
    made = engine(*(balancer(name, number, cluster_ip=f"10.96.0.{ip}") for name, number, ip in wants))
    exposed = {port(number, annotation=ANNOTATION if number % 2 else "") for number in there}
    plan = made.plan(list(exposed))
    exposed = exposed - set(plan.close) | {want.port for want in plan.open}
    after = made.plan(list(exposed))
    assert (after.close, after.open) == ((), ())
    assert len({(one.proto, one.out_port) for one in exposed}) == len(exposed)
