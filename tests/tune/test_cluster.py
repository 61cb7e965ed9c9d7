"""Which Ray a sweep may join; with no Ray started."""

import socket

import pytest

from patchrank.tune.cluster import check_address
from patchrank.utils.errors import UserError


def test_an_address_at_which_nobody_listens_is_told_at_once():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        check_address(address)
    with pytest.raises(UserError, match=f"Ray cluster {address} cannot be reached .*refused.*; try --address"):
        check_address(address)


def test_ports_that_no_machine_has_are_told_and_names_are_left_to_ray():
    with pytest.raises(UserError, match="Ray cluster 127.0.0.1:99999999 cannot be reached"):
        check_address("127.0.0.1:99999999")
    check_address("auto")
