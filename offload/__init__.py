"""Where experts lie, what moves them, and what computes them.

The tables name the moves of experts: from where, to where, when, what decides which experts move, and the
function to read first. The bytes of a token's uploads are queued by `HostStep::queue_uploads`, those of a
prompt's by `LayerUploads.upload`. Copies that place no expert are not listed: the split expert, which the GPU
reads straight from RAM, the self-check, measurements. "-" stands for an expert that is dropped, because
another tier holds it. The weakest experts have the least value divided by the layer steps until their layer
runs again (`Residency::weakest` in `csrc/residency/residency.cpp`). In exclusive mode an expert lies in RAM
or on the GPU, but not in both; otherwise, "inclusive", every expert lies in RAM. A cold expert lies on the
drive only. `ring` and `cache` are parts of the GPU's slab.

Loading:

| from  | to    | when                      | what decides                | function                         |
| ----- | ----- | ------------------------- | --------------------------- | -------------------------------- |
| drive | RAM   | loading                   | order of router statistics, | memory/ram_slab.py               |
|       |       |                           | or the first experts of     | RamSlab.fill                     |
|       |       |                           | every layer                 |                                  |
| RAM   | GPU   | loading                   | the same order: the first   | memory/gpu_slab.py               |
|       |       |                           | ones go to the GPU          | GpuSlab.fill                     |

A prompt or a token, on a box without a GPU:

| from  | to    | when                      | what decides                | function                         |
| ----- | ----- | ------------------------- | --------------------------- | -------------------------------- |
| drive | RAM   | an expert without a row   | the router                  | memory/ram_cache.py              |
|       |       | is picked                 |                             | RamCache.demand                  |
| drive | RAM   | a token's layer is        | the next layers' routers,   | prefetch/prefetch.py             |
|       |       | computed                  | applied early, and an A/B   | Prefetcher.prefetch_next         |
|       |       |                           | trial                       |                                  |
| RAM   | -     | a prefetch is wrong       | the router, when it picks   | memory/ram_cache.py              |
|       |       |                           | other experts               | RamCache.cancel_prefetch         |
| RAM   | -     | a read needs a row        | the weakest that is not in  | memory/ram_cache.py              |
|       |       |                           | use                         | RamCache.demand                  |
| RAM   | -     | a layer is computed       | the weakest, until the      | memory/ram_cache.py              |
|       |       |                           | reserve is free             | RamCache.trim                    |

A token, on a box with a GPU (`csrc/decode/host_step.cpp` calls all of it):

| from  | to    | when                      | what decides                | function                         |
| ----- | ----- | ------------------------- | --------------------------- | -------------------------------- |
| RAM   | GPU   | a layer is routed         | misses are split between    | csrc/decode/host_step.cpp        |
|       |       |                           | PCIe and CPU; the most      | HostStep::split                  |
|       |       |                           | valuable are uploaded, and  |                                  |
|       |       |                           | stay                        |                                  |
| RAM   | GPU   | the next layer is not     | the GPU's prediction of its | csrc/decode/upload_ahead.cpp     |
|       |       | routed yet                | picks; free slots only      | UploadAhead::queue_pieces        |
| GPU   | -     | inclusive; a layer is     | the weakest, until the      | csrc/decode/slot_eviction.cpp    |
|       |       | routed                    | reserve is free             | SlotEviction::make_room          |
| GPU   | RAM   | exclusive; a layer is     | the weakest, until the      | csrc/decode/slot_eviction.cpp    |
|       |       | routed                    | reserve is free             | SlotEviction::begin_downloads    |
| RAM   | -     | exclusive; the step after | uploaded, and not evicted   | csrc/decode/slot_eviction.cpp    |
|       |       | an upload                 | at once                     | SlotEviction::free_uploaded_rows |
| drive | RAM   | a cold expert is picked   | the router                  | csrc/decode/cold_reader.cpp      |
|       |       |                           |                             | ColdReader::read                 |
| RAM   | -     | cold experts exist; a     | the weakest, until the      | csrc/residency/ram_rows.cpp      |
|       |       | layer is routed           | reserve is free             | RamRows::make_room               |

A prompt, on a box with a GPU (`prefill/layer.py` calls all of it):

| from  | to    | when                      | what decides                | function                         |
| ----- | ----- | ------------------------- | --------------------------- | -------------------------------- |
| RAM   | GPU   | a layer is routed         | misses are split between    | prefill/two_roads.py             |
|       |       |                           | PCIe and CPU: those with    | TwoRoads.share                   |
|       |       |                           | most tokens are uploaded    |                                  |
| RAM   | GPU   | a layer's uploads are all | the highest scores of the   | prefill/upload_ring.py           |
|       |       | queued                    | next layer                  | NextLayerUploads.start           |
| ring  | cache | uploaded ahead, and got   | it outscores the weakest in | prefill/admission.py             |
|       |       | tokens                    | the cache (as for all       | Admissions.plan                  |
|       |       |                           | uploads)                    |                                  |
| GPU   | -     | inclusive; an expert      | the weakest, unless in use  | prefill/admission.py             |
|       |       | comes                     |                             | Admissions.slot                  |
| GPU   | RAM   | exclusive; an expert came | the weakest, unless in use  | prefill/admission.py             |
|       |       |                           |                             | ExclusiveAdmissions.uploaded     |
| RAM   | -     | exclusive; an expert was  | no victim needs its row     | prefill/admission.py             |
|       |       | uploaded to stay          |                             | ExclusiveAdmissions.uploaded     |
| GPU   | RAM   | cold experts exist; an    | the weakest, unless in use, | prefill/admission.py             |
|       |       | expert came               | if a row is free            | ColdAdmissions.uploaded          |
| RAM   | -     | cold experts exist; an    | its upload is complete      | prefill/admission.py             |
|       |       | expert was uploaded to    |                             | ColdAdmissions.finish            |
|       |       | stay                      |                             |                                  |
| drive | RAM   | cold experts have tokens  | the router                  | prefill/cold_reads.py            |
|       |       |                           |                             | LayerReads.next_batch            |
| RAM   | -     | reads need rows           | the weakest, unless in use  | prefill/cold_reads.py            |
|       |       |                           |                             | LayerReads.next_batch            |
| RAM   | -     | cold experts are computed | the layer's lowest scores   | prefill/cold_reads.py            |
|       |       |                           |                             | LayerReads.end_batch             |
"""
