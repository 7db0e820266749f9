"""The candidate engine: candidates of many requests decoded in one batch over pages of keys and values, and ranked.

The control plane (`scheduler`, `page_pool`) is pure Python and decides which candidate decodes in which slot and page;
the data plane (`runner`, `decoder`) holds weights and pages and is the only place that copies between host and device.
"""
