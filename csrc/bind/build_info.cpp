// A file of its own: it alone is compiled anew whenever any source changes.
namespace st {

const char* csrc_hash() { return ST_CSRC_HASH; }

}  // namespace st
