"""Pages of keys and values: which are free, and how many hold on to each that is not."""

from collections.abc import Iterable


class OutOfPages(RuntimeError):
    """Fewer pages are free than were asked for."""


class PagePool:
    """`num_pages` pages, numbered from 0. A page is free, or has as many references as there are tables that name it.

    `free_pages` and `used_pages` count pages, not references.
    """

    def __init__(self, num_pages: int):
        if num_pages < 1:
            raise ValueError(f"a page pool needs at least one page, not {num_pages}")
        self.num_pages = num_pages
        self._free = list(reversed(range(num_pages)))  # a stack: the page that came back last is handed out first
        self._references = [0] * num_pages

    @property
    def free_pages(self) -> int:
        return len(self._free)

    @property
    def used_pages(self) -> int:
        return self.num_pages - len(self._free)

    def references(self, page: int) -> int:
        """How many hold on to `page`; 0: it is free."""
        return self._references[page]

    def allocate(self, count: int) -> list[int]:
        """`count` pages that were free, with one reference each.

        Raises `OutOfPages`, and changes nothing, where fewer are free.
        """
        if not 0 <= count <= len(self._free):
            raise OutOfPages(f"{count} pages were asked for, and {len(self._free)} of {self.num_pages} are free")
        split = len(self._free) - count
        pages = self._free[split:]
        del self._free[split:]
        for page in pages:
            self._references[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more reference to each. Raises `ValueError` for a free page, which nobody has to share."""
        for page in pages:
            if self._references[page] < 1:
                raise ValueError(f"page {page} is free and cannot be shared")
            self._references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One reference less to each; a page without any is free. Raises `ValueError` for a page that was free."""
        for page in pages:
            if self._references[page] < 1:
                raise ValueError(f"page {page} is free already and cannot be released again")
            self._references[page] -= 1
            if not self._references[page]:
                self._free.append(page)
