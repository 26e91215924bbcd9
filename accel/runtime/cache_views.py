"""Caches by name, each made a tensor when it is read."""

from collections.abc import Callable, Collection, Iterator, Mapping

from torch import Tensor


class CacheViews(Mapping[str, Tensor]):
    """Tensors by name. One is made at each access, so that a read of one cache doesn't cost those of all layers.

    Args:
        names: The names, in order.
        make: Function from a name to its tensor.
    """

    def __init__(self, names: Collection[str], make: Callable[[str], Tensor]) -> None:
        self._names, self._make = names, make

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # what `Mapping` has would make the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
