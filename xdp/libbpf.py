"""libbpf through cffi, in ABI mode: declarations here, the library at run time.

Rule: only this module and libc.py declare foreign functions.

Theory. ABI mode needs no compiler on the node. libbpf's option structures carry their own size, so
a newer library accepts what is declared here. Functions return a negative errno in libbpf 1.x.
"""

from typing import Any

import cffi

from xdp.errors import UnsupportedError

ffi: Any = cffi.FFI()
ffi.cdef(
    """
    typedef int (*libbpf_print_fn_t)(int level, const char *, void *ap);
    void *libbpf_set_print(void *fn);
    int libbpf_num_possible_cpus(void);
    const char *libbpf_version_string(void);

    struct bpf_object;
    struct bpf_program;
    struct bpf_map;
    struct bpf_object_open_opts {
      size_t sz;
      const char *object_name;
      bool relaxed_maps;
      const char *pin_root_path;
      uint32_t attach_prog_fd_;
      const char *kconfig;
      const char *btf_custom_path;
      char *kernel_log_buf;
      size_t kernel_log_size;
      uint32_t kernel_log_level;
    };
    struct bpf_object *bpf_object__open_file(const char *path, const void *opts);
    int bpf_object__load(struct bpf_object *obj);
    void bpf_object__close(struct bpf_object *obj);
    struct bpf_program *bpf_object__next_program(const struct bpf_object *, struct bpf_program *);
    struct bpf_map *bpf_object__next_map(const struct bpf_object *, const struct bpf_map *);
    const char *bpf_program__name(const struct bpf_program *);
    int bpf_program__fd(const struct bpf_program *);
    uint32_t bpf_program__flags(const struct bpf_program *);
    int bpf_program__set_flags(struct bpf_program *, uint32_t);
    const char *bpf_map__name(const struct bpf_map *);
    int bpf_map__fd(const struct bpf_map *);
    uint32_t bpf_map__type(const struct bpf_map *);
    uint32_t bpf_map__key_size(const struct bpf_map *);
    uint32_t bpf_map__value_size(const struct bpf_map *);
    uint32_t bpf_map__max_entries(const struct bpf_map *);
    int bpf_map__set_max_entries(struct bpf_map *, uint32_t);
    int bpf_map__reuse_fd(struct bpf_map *, int fd);

    int bpf_map_update_elem(int fd, const void *key, const void *value, uint64_t flags);
    int bpf_map_lookup_elem(int fd, const void *key, void *value);
    int bpf_map_delete_elem(int fd, const void *key);
    int bpf_map_get_next_key(int fd, const void *key, void *next_key);

    int bpf_map_get_fd_by_id(uint32_t id);
    struct bpf_map_info {
      uint32_t type;
      uint32_t id;
      uint32_t key_size;
      uint32_t value_size;
      uint32_t max_entries;
      uint32_t map_flags;
      char name[16];
      uint8_t rest[64];
    };
    int bpf_obj_get_info_by_fd(int fd, void *info, uint32_t *length);

    int bpf_link_detach(int link_fd);
    int bpf_link_update(int link_fd, int prog_fd, const void *opts);
    struct bpf_link_create_opts { size_t sz; uint32_t flags; uint8_t rest[64]; };
    int bpf_link_create(int prog_fd, int target_fd, int attach_type, const void *opts);

    struct bpf_xdp_attach_opts { size_t sz; int old_prog_fd; size_t :0; };
    int bpf_xdp_attach(int ifindex, int prog_fd, uint32_t flags, const void *opts);
    int bpf_xdp_detach(int ifindex, uint32_t flags, const void *opts);
    struct bpf_xdp_query_opts {
      size_t sz;
      uint32_t prog_id;
      uint32_t drv_prog_id;
      uint32_t hw_prog_id;
      uint32_t skb_prog_id;
      uint8_t attach_mode;
      uint8_t padding[7];
    };
    int bpf_xdp_query(int ifindex, int flags, struct bpf_xdp_query_opts *opts);

    struct bpf_tc_hook { size_t sz; int ifindex; int attach_point; uint32_t parent; size_t :0; };
    struct bpf_tc_opts {
      size_t sz;
      int prog_fd;
      uint32_t flags;
      uint32_t prog_id;
      uint32_t handle;
      uint32_t priority;
      size_t :0;
    };
    int bpf_tc_hook_create(struct bpf_tc_hook *hook);
    int bpf_tc_attach(const struct bpf_tc_hook *hook, struct bpf_tc_opts *opts);
    int bpf_tc_detach(const struct bpf_tc_hook *hook, const struct bpf_tc_opts *opts);
    int bpf_tc_query(const struct bpf_tc_hook *hook, struct bpf_tc_opts *opts);

    struct bpf_test_run_opts {
      size_t sz;
      const void *data_in;
      void *data_out;
      uint32_t data_size_in;
      uint32_t data_size_out;
      const void *ctx_in;
      void *ctx_out;
      uint32_t ctx_size_in;
      uint32_t ctx_size_out;
      uint32_t retval;
      int repeat;
      uint32_t duration;
      uint32_t flags;
      uint32_t cpu;
      uint32_t batch_size;
    };
    int bpf_prog_test_run_opts(int prog_fd, struct bpf_test_run_opts *opts);

    struct bpf_prog_load_opts {
      size_t sz;
      int attempts;
      int expected_attach_type;
      uint32_t prog_btf_fd;
      uint32_t prog_flags;
      uint8_t rest[80];
    };
    int bpf_prog_load(int type, const char *name, const char *license, const void *instructions,
                      size_t count, const struct bpf_prog_load_opts *opts);
    struct bpf_map_create_opts {
      size_t sz;
      uint32_t btf_fd;
      uint32_t btf_key_type_id;
      uint32_t btf_value_type_id;
      uint32_t btf_vmlinux_value_type_id;
      uint32_t inner_map_fd;
      uint32_t map_flags;
      uint64_t map_extra;
      uint32_t numa_node;
      uint32_t map_ifindex;
    };
    int bpf_map_create(int type, const char *name, uint32_t key_size, uint32_t value_size,
                       uint32_t max_entries, const struct bpf_map_create_opts *opts);

    struct sk_buff_in {  /* struct __sk_buff; what stands between is not for who calls */
      uint32_t before[10];
      uint32_t ifindex;
      uint32_t between[30];
      uint32_t gso_segs;
      uint32_t sk[2];
      uint32_t gso_size;
      uint32_t behind[3];
    };
    struct xdp_md_in {
      uint32_t data;
      uint32_t data_end;
      uint32_t data_meta;
      uint32_t ingress_ifindex;
      uint32_t rx_queue_index;
      uint32_t egress_ifindex;
    };
    """.replace(" size_t :0;", " int padding_;")
)

try:
    lib: Any = ffi.dlopen("libbpf.so.1")
except OSError as error:  # pragma: no cover - a machine without the package
    raise UnsupportedError(f"libbpf.so.1 not found ({error}): apt install libbpf1") from error

# libbpf talks on stderr by default; what matters comes back in errors instead.
lib.libbpf_set_print(ffi.NULL)


def text(pointer) -> str:
    """Return a C string of libbpf as str."""
    return ffi.string(pointer).decode()
