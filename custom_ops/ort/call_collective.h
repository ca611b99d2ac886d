// How operators call the ranks' collectives.
#ifndef LLMPACK_ORT_CALL_COLLECTIVE_H_
#define LLMPACK_ORT_CALL_COLLECTIVE_H_

#include "cpu/collectives.h"
#include "ort/kernel.h"

namespace llmpack::ort {

// collective(), whose errors are a failure and not the graph's fault.
template <class Collective>
void call_collective(const Collective& collective) {
    try {
        collective();
    } catch (const CollectiveError& error) {
        throw OpError(error.what(), kFail);
    }
}

}  // namespace llmpack::ort

#endif  // LLMPACK_ORT_CALL_COLLECTIVE_H_
