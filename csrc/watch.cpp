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
FD_PYTHON ptrdiff_t PyDict_Size(PyObject*);
FD_PYTHON ptrdiff_t PyList_Size(PyObject*);
FD_PYTHON PyObject* PyList_GetItem(PyObject*, ptrdiff_t);

namespace {

// Holds what it remembers, so that no other object gets its address.
class Watch {
 public:
  // Dicts whose keys and values shall stay; dicts whose keys shall stay and which of the values are `none`; objects
  // whose classes shall stay; and objects, each with a name, whose attributes of these names shall stay.
  Watch(PyObject* held, PyObject* tensors, PyObject* objects, PyObject* owners, PyObject* names, PyObject* none)
      : lists_{held, tensors, objects, owners, names}, none_(none) {
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
    size_t i = 0;
    return look([&](PyObject* seen) { return i < seen_.size() && seen_[i++] == seen; }) && i == seen_.size();
  }

 private:
  // What is to be seen, in order, for as long as `f` wants more.
  template <class F>
  bool look(const F& f) const {
    const auto [held, tensors, objects, owners, names] = lists_;
    for (ptrdiff_t i = 0, count = PyList_Size(held); i < count; ++i) {
      PyObject* const dict = PyList_GetItem(held, i);
      PyObject *key, *value;
      for (ptrdiff_t place = 0; PyDict_Next(dict, &place, &key, &value);) {
        if (!f(key) || !f(value)) return false;
      }
      if (!f(dict)) return false;  // where one dict ends
    }
    for (ptrdiff_t i = 0, count = PyList_Size(tensors); i < count; ++i) {
      PyObject* const dict = PyList_GetItem(tensors, i);
      PyObject *key, *value;
      for (ptrdiff_t place = 0; PyDict_Next(dict, &place, &key, &value);) {
        if (!f(key) || !f(value == none_ ? none_ : dict)) return false;
      }
      if (!f(dict)) return false;
    }
    for (ptrdiff_t i = 0, count = PyList_Size(objects); i < count; ++i) {
      if (!look_at(PyObject_Type(PyList_GetItem(objects, i)), f)) return false;
    }
    for (ptrdiff_t i = 0, count = PyList_Size(owners); i < count; ++i) {
      if (!look_at(PyObject_GetAttr(PyList_GetItem(owners, i), PyList_GetItem(names, i)), f)) return false;
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

  struct Lists {
    PyObject *held, *tensors, *objects, *owners, *names;
    PyObject** begin() { return &held; }
    PyObject** end() { return &names + 1; }
  } lists_;
  PyObject* none_;
  std::vector<PyObject*> seen_;
};

}  // namespace

FD_EXPORTED Watch* fused_densenet_watch(PyObject* held, PyObject* tensors, PyObject* objects, PyObject* owners,
                                        PyObject* names, PyObject* none) {
  return new Watch(held, tensors, objects, owners, names, none);
}

FD_EXPORTED bool fused_densenet_watch_holds(const Watch* watch) { return watch->holds(); }

FD_EXPORTED void fused_densenet_watch_end(Watch* watch) { delete watch; }
