"""The pool of pages of keys and values: it knows which are free, and counts references to the others."""

from collections.abc import Iterable


class OutOfPages(RuntimeError):
    """An allocation that asks for more pages than are free."""


class PagePool:
    """`num_pages` pages, numbered from 0. A page is free, or has one reference for each table that names it.

    `free_pages` and `used_pages` count pages, not references.
    """

    def __init__(self, num_pages: int):
        if num_pages < 1:
            raise ValueError(f"a page pool needs at least one page, not {num_pages}")
        self.num_pages = num_pages
        self._free = list(reversed(range(num_pages)))  # a stack: the page that was released last is allocated first
        self._references = [0] * num_pages

    @property
    def free_pages(self) -> int:
        return len(self._free)

    @property
    def used_pages(self) -> int:
        return self.num_pages - len(self._free)

    def references(self, page: int) -> int:
        """Return the number of references to `page`; 0: it is free."""
        return self._references[page]

    def allocate(self, count: int) -> list[int]:
        """Take `count` free pages, with one reference each.

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
        """Add a reference to each page. Raises `ValueError` for a free page, which cannot be shared."""
        for page in pages:
            if self._references[page] < 1:
                raise ValueError(f"page {page} is free and cannot be shared")
            self._references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Drop a reference to each page, and free those that have none left. Raises `ValueError` for a free page."""
        for page in pages:
            if self._references[page] < 1:
                raise ValueError(f"page {page} is free already and cannot be released again")
            self._references[page] -= 1
            if not self._references[page]:
                self._free.append(page)
