// What the exported functions share: exceptions become -1 and a message for llmpack_ops_last_error.
#ifndef LLMPACK_GUARDED_H_
#define LLMPACK_GUARDED_H_

#include <exception>
#include <string>

#include "llmpack_ops.h"

namespace llmpack {

int failed(const std::string& message);  // remembers it for this thread; -1

// Runs what throws; 0, or -1 with the function's name in the message.
template <class Body>
int guarded(const char* function, const Body& body) {
    try {
        body();
        return 0;
    } catch (const std::exception& error) {
        return failed(std::string(function) + ": " + error.what() + ".");
    }
}

}  // namespace llmpack

#endif  // LLMPACK_GUARDED_H_
