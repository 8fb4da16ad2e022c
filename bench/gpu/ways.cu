// SPDX-License-Identifier: Apache-2.0
/*
 * Ways to come by GPU memory, for the table of what holds a quota: ways MODE GIB HOLD_S. Takes a
 * GiB after the other, says how many it got, holds them, and says that it lived. The CUDA runtime
 * is linked statically, as nvcc does by itself.
 */
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cuda.h>
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <unistd.h>

static const size_t GIB = (size_t)1 << 30;

__global__ void nothing()
{
}

static void *driver_function(const char *name)
{
	return dlsym(dlopen("libcuda.so.1", RTLD_LAZY), name);
}

static bool by_runtime()
{
	void *p;
	return cudaMalloc(&p, GIB) == cudaSuccess;
}

static bool by_managed()
{
	void *p;
	return cudaMallocManaged(&p, GIB) == cudaSuccess && cudaMemset(p, 1, GIB) == cudaSuccess &&
	       cudaDeviceSynchronize() == cudaSuccess;
}

static bool by_pool()
{
	void *p;
	return cudaMallocAsync(&p, GIB, 0) == cudaSuccess && cudaDeviceSynchronize() == cudaSuccess;
}

static bool by_driver()
{
	static auto alloc = (CUresult(*)(CUdeviceptr *, size_t))driver_function("cuMemAlloc_v2");
	CUdeviceptr p;
	return alloc && alloc(&p, GIB) == CUDA_SUCCESS;
}

/* The handle is given back at once; what is mapped stays. */
static bool by_mapping()
{
	static auto create = (CUresult(*)(CUmemGenericAllocationHandle *, size_t,
					  const CUmemAllocationProp *,
					  unsigned long long))driver_function("cuMemCreate");
	static auto release =
		(CUresult(*)(CUmemGenericAllocationHandle))driver_function("cuMemRelease");
	static auto reserve = (CUresult(*)(CUdeviceptr *, size_t, size_t, CUdeviceptr,
					   unsigned long long))driver_function("cuMemAddressReserve");
	static auto map = (CUresult(*)(CUdeviceptr, size_t, size_t, CUmemGenericAllocationHandle,
				       unsigned long long))driver_function("cuMemMap");
	CUmemAllocationProp prop = {};
	CUmemGenericAllocationHandle handle;
	CUdeviceptr at;

	prop.type = CU_MEM_ALLOCATION_TYPE_PINNED;
	prop.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
	if (create(&handle, GIB, &prop, 0) || reserve(&at, GIB, 0, 0, 0) ||
	    map(at, GIB, 0, handle, 0))
		return false;
	return release(handle) == CUDA_SUCCESS;
}

static bool by_graph()
{
	cudaMemAllocNodeParams params = {};
	cudaGraphNode_t node;
	cudaGraph_t graph;
	cudaGraphExec_t ready;

	params.poolProps.allocType = cudaMemAllocationTypePinned;
	params.poolProps.location.type = cudaMemLocationTypeDevice;
	params.bytesize = GIB;
	return cudaGraphCreate(&graph, 0) == cudaSuccess &&
	       cudaGraphAddMemAllocNode(&node, graph, nullptr, 0, &params) == cudaSuccess &&
	       cudaGraphInstantiate(&ready, graph, 0) == cudaSuccess &&
	       cudaGraphLaunch(ready, 0) == cudaSuccess && cudaDeviceSynchronize() == cudaSuccess;
}

static double micros(std::chrono::steady_clock::time_point since, int count)
{
	std::chrono::duration<double, std::micro> passed = std::chrono::steady_clock::now() - since;
	return passed.count() / count;
}

static int costs()
{
	void *p;

	for (int i = 0; i < 200; i++)
		if (cudaMalloc(&p, 4 << 20) == cudaSuccess)
			cudaFree(p);
	auto begin = std::chrono::steady_clock::now();
	for (int i = 0; i < 2000; i++)
		if (cudaMalloc(&p, 4 << 20) == cudaSuccess)
			cudaFree(p);
	double pair = micros(begin, 2000);

	for (int i = 0; i < 2000; i++)
		nothing<<<1, 1>>>();
	cudaDeviceSynchronize();
	begin = std::chrono::steady_clock::now();
	for (int i = 0; i < 100000; i++)
		nothing<<<1, 1>>>();
	cudaDeviceSynchronize();
	printf("{\"alloc_free_us\": %.3f, \"launch_us\": %.3f}\n", pair, micros(begin, 100000));
	return 0;
}

int main(int argc, char **argv)
{
	const char *mode = argc > 1 ? argv[1] : "";
	int wanted = argc > 2 ? atoi(argv[2]) : 0, hold_s = argc > 3 ? atoi(argv[3]) : 0, got = 0;
	struct {
		const char *name;
		bool (*take)();
	} ways[] = { { "runtime", by_runtime }, { "driver", by_driver }, { "managed", by_managed },
		     { "pool", by_pool },	{ "mapping", by_mapping }, { "graph", by_graph } };

	if (cudaFree(0) != cudaSuccess) {
		printf("no device: %s\n", cudaGetErrorString(cudaGetLastError()));
		return 2;
	}
	if (!strcmp(mode, "costs"))
		return costs();
	for (auto &way : ways)
		if (!strcmp(way.name, mode))
			while (got < wanted && way.take())
				got++;
	printf("got %d\n", got);
	fflush(stdout);
	sleep(hold_s);
	printf("lived\n");
	return 0;
}
