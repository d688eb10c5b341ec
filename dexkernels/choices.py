"""The allowed values of arguments that are names, as types; the checks take their values from here."""

from typing import Literal, get_args

RoutingName = Literal["image", "token"]
RouteFrom = Literal["cls", "mean"]
AlignKind = Literal["kd", "cosine", "mse"]
PathName = Literal["experts", "director"]
ActivationName = Literal["gelu", "gelu_tanh"]
LayoutName = Literal["tokens", "channels_last", "channels_first"]
BackendName = Literal["reference", "triton", "cuda"]

ROUTINGS: tuple[RoutingName, ...] = get_args(RoutingName)
ROUTE_FROM: tuple[RouteFrom, ...] = get_args(RouteFrom)
KINDS: tuple[AlignKind, ...] = get_args(AlignKind)
PATHS: tuple[PathName, ...] = get_args(PathName)
BACKENDS: tuple[BackendName, ...] = get_args(BackendName)
