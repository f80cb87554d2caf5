// The Python side of an operator module: importing it loads the library, whose operators register
// themselves (STABLE_TORCH_LIBRARY_FRAGMENT in each file). There is nothing in the module itself.
#include <Python.h>

#define FASTMARGIN_CONCAT(a, b) a##b
#define FASTMARGIN_INIT(name) FASTMARGIN_CONCAT(PyInit_, name)
#define FASTMARGIN_STRING(name) #name
#define FASTMARGIN_NAME(name) FASTMARGIN_STRING(name)

PyMODINIT_FUNC FASTMARGIN_INIT(FASTMARGIN_MODULE)() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                                   FASTMARGIN_NAME(FASTMARGIN_MODULE),
                                   nullptr,
                                   -1,
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   nullptr};
  return PyModule_Create(&definition);
}
