// Whether Python objects are as they were: what fused_densenet/fallback/standing.py asks at every call of a module.
//
// Of Python's C API only functions of its stable ABI are used, declared here: one library serves every Python from 3.10
// on, is compiled without Python's headers, and loads (unused) in a process without Python. Whoever calls holds the
// GIL.

#include <cstddef>
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
FD_PYTHON ptrdiff_t PyList_Size(PyObject*);
FD_PYTHON PyObject* PyList_GetItem(PyObject*, ptrdiff_t);

namespace {

// Holds what it remembers, so that no other object gets its address.
class Watch {
 public:
  // Dicts whose keys and values shall stay; dicts whose keys shall stay and which of the values are `none`; objects
  // whose classes shall stay; and objects, each with a name, whose attributes of these names shall stay.
  Watch(PyObject* held, PyObject* tensors, PyObject* objects, PyObject* owners, PyObject* names, PyObject* none)
      : lists_{held, tensors, objects, owners, names},
        none_(none),
        held_(members(held)),
        tensors_(members(tensors)),
        objects_(members(objects)),
        owners_(members(owners)),
        names_(members(names)) {
    for (PyObject* list : lists_) Py_IncRef(list);
    look([this](PyObject* seen) {
      Py_IncRef(seen);
      seen_.push_back(seen);
      return true;
    });
  }
  Watch(const Watch&) = delete;
  Watch& operator=(const Watch&) = delete;
  ~Watch() {
    for (PyObject* seen : seen_) Py_DecRef(seen);
    for (PyObject* list : lists_) Py_DecRef(list);
  }

  bool holds() const {
    PyObject* const* next = seen_.data();
    PyObject* const* const end = next + seen_.size();
    return look([&](PyObject* seen) { return next != end && *next++ == seen; }) && next == end;
  }

 private:
  using Objects = std::vector<PyObject*>;
  static constexpr size_t kAhead = 8;  // dicts on their way from memory

  static Objects members(PyObject* list) {
    Objects result;
    for (ptrdiff_t i = 0, count = PyList_Size(list); i < count; ++i) result.push_back(PyList_GetItem(list, i));
    return result;
  }

  // Calls f(object) for all that is watched, in one order, until it says no.
  template <class F>
  bool look(const F& f) const {
    const auto look_at_dicts = [&](const Objects& dicts, auto entry) {
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
    if (!look_at_dicts(held_, [](PyObject*, PyObject* value) { return value; })) return false;
    const auto is_none = [this](PyObject* dict, PyObject* value) { return value == none_ ? none_ : dict; };
    if (!look_at_dicts(tensors_, is_none)) return false;
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
  Objects seen_;
};

}  // namespace

FD_EXPORTED Watch* fused_densenet_watch(PyObject* held, PyObject* tensors, PyObject* objects, PyObject* owners,
                                        PyObject* names, PyObject* none) {
  return new Watch(held, tensors, objects, owners, names, none);
}

FD_EXPORTED bool fused_densenet_watch_holds(const Watch* watch) { return watch->holds(); }

FD_EXPORTED void fused_densenet_watch_end(Watch* watch) { delete watch; }
