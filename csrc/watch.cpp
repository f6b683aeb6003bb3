// Whether Python objects are as they were: what fused_densenet/fallback/standing.py asks at every call of a module.
//
// Of Python's C API only functions of its stable ABI are used, declared here: one library serves every Python from 3.10
// on, is compiled without Python's headers, and loads (unused) in a process without Python. Whoever calls holds the
// GIL.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#define FD_PYTHON extern "C" __attribute__((weak))
#define FD_EXPORTED extern "C" __attribute__((visibility("default")))

struct _object;
typedef struct _object PyObject;

FD_PYTHON void Py_IncRef(PyObject*);
FD_PYTHON void Py_DecRef(PyObject*);
FD_PYTHON PyObject* PyObject_GetAttr(PyObject*, PyObject*);
FD_PYTHON PyObject* PyObject_Type(PyObject*);
FD_PYTHON void PyErr_Clear();
FD_PYTHON int PyDict_Next(PyObject*, ptrdiff_t*, PyObject**, PyObject**);
FD_PYTHON ptrdiff_t PyDict_Size(PyObject*);
FD_PYTHON ptrdiff_t PyList_Size(PyObject*);
FD_PYTHON PyObject* PyList_GetItem(PyObject*, ptrdiff_t);

namespace {

// Holds what it remembers, so that no other object gets its address.
class Watch {
 public:
  // Dicts whose keys and values shall stay; dicts whose keys shall stay and which of the values are `none`; objects
  // whose classes shall stay; and objects, each with a name, whose attributes of these names shall stay. Dicts keep
  // their versions so many bytes behind their addresses, or none where that is 0.
  Watch(PyObject* held, PyObject* tensors, PyObject* objects, PyObject* owners, PyObject* names, PyObject* none,
        size_t versions_at)
      : lists_{held, tensors, objects, owners, names},
        none_(none),
        held_(members(held)),
        tensors_(members(tensors)),
        objects_(members(objects)),
        owners_(members(owners)),
        names_(members(names)),
        versions_at_(are_dicts(held_) && are_dicts(tensors_) ? versions_at : 0) {
    for (PyObject* list : lists_) Py_IncRef(list);
    const auto remember = [this](PyObject* seen) {
      Py_IncRef(seen);
      seen_.push_back(seen);
      return true;
    };
    look_at_others(remember);
    in_dicts_ = seen_.size();
    look_at_dicts(remember);
    remember_versions();
  }
  Watch(const Watch&) = delete;
  Watch& operator=(const Watch&) = delete;
  ~Watch() {
    for (PyObject* seen : seen_) Py_DecRef(seen);
    for (PyObject* list : lists_) Py_DecRef(list);
  }

  bool holds() {
    PyObject* const* next = seen_.data();
    PyObject* const* const end = next + seen_.size();
    const auto is_next = [&](PyObject* seen) { return next != end && *next++ == seen; };
    if (!look_at_others(is_next) || next != seen_.data() + in_dicts_) return false;
    if (have_the_same_versions()) return true;
    if (!look_at_dicts(is_next) || next != end) return false;
    remember_versions();
    return true;
  }

 private:
  using Objects = std::vector<PyObject*>;
  static constexpr size_t kAhead = 8;  // dicts on their way from memory

  static Objects members(PyObject* list) {
    Objects result;
    for (ptrdiff_t i = 0, count = PyList_Size(list); i < count; ++i) result.push_back(PyList_GetItem(list, i));
    return result;
  }

  static bool are_dicts(const Objects& objects) {
    for (PyObject* object : objects) {
      if (PyDict_Size(object) >= 0) continue;
      PyErr_Clear();
      return false;
    }
    return true;
  }

  // CPython gives a dict another one, that none has had, whenever it changes (PEP 509, until Python 3.12).
  uint64_t version(PyObject* dict) const {
    uint64_t result;
    std::memcpy(&result, reinterpret_cast<const char*>(dict) + versions_at_, sizeof(result));
    return result;
  }

  bool have_the_same_versions() const {
    if (versions_at_ == 0) return false;
    const uint64_t* next = versions_.data();
    for (const Objects* dicts : {&held_, &tensors_}) {
      for (PyObject* dict : *dicts) {
        if (version(dict) != *next++) return false;
      }
    }
    return true;
  }

  void remember_versions() {
    if (versions_at_ == 0) return;
    versions_.clear();
    for (const Objects* dicts : {&held_, &tensors_}) {
      for (PyObject* dict : *dicts) versions_.push_back(version(dict));
    }
  }

  // Calls f(object) for all that is in dicts, in one order, until it says no.
  template <class F>
  bool look_at_dicts(const F& f) const {
    const auto look_at_all = [&](const Objects& dicts, auto entry) {
      for (size_t i = 0; i < dicts.size(); ++i) {
        if (i + kAhead < dicts.size()) __builtin_prefetch(dicts[i + kAhead]);
        PyObject *key, *value;
        for (ptrdiff_t place = 0; PyDict_Next(dicts[i], &place, &key, &value);) {
          if (!f(key) || !f(entry(dicts[i], value))) return false;
        }
        if (!f(dicts[i])) return false;  // where one dict ends
      }
      return true;
    };
    const auto is_none = [this](PyObject* dict, PyObject* value) { return value == none_ ? none_ : dict; };
    return look_at_all(held_, [](PyObject*, PyObject* value) { return value; }) && look_at_all(tensors_, is_none);
  }

  // The same for classes and for attributes by name.
  template <class F>
  bool look_at_others(const F& f) const {
    for (PyObject* object : objects_) {
      if (!look_at(PyObject_Type(object), f)) return false;
    }
    for (size_t i = 0; i < owners_.size(); ++i) {
      if (!look_at(PyObject_GetAttr(owners_[i], names_[i]), f)) return false;
    }
    return true;
  }

  template <class F>
  bool look_at(PyObject* found, const F& f) const {
    if (found == nullptr) {
      PyErr_Clear();
      return f(none_);
    }
    const bool wanted = f(found);
    Py_DecRef(found);
    return wanted;
  }

  PyObject* lists_[5];
  PyObject* none_;
  Objects held_, tensors_, objects_, owners_, names_;
  size_t versions_at_, in_dicts_ = 0;
  Objects seen_;
  std::vector<uint64_t> versions_;
};

}  // namespace

FD_EXPORTED Watch* fused_densenet_watch(PyObject* held, PyObject* tensors, PyObject* objects, PyObject* owners,
                                        PyObject* names, PyObject* none, size_t versions_at) {
  return new Watch(held, tensors, objects, owners, names, none, versions_at);
}

FD_EXPORTED bool fused_densenet_watch_holds(Watch* watch) { return watch->holds(); }

FD_EXPORTED void fused_densenet_watch_end(Watch* watch) { delete watch; }
