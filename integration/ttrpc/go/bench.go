// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strconv"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/wrapperspb"
)

// bench calls Echo from a number of goroutines. The first tenth of the time isn't counted.
func bench(path string, args []string) error {
	if len(args) != 3 {
		return fmt.Errorf("bench SOCKET SECONDS IN_FLIGHT BYTES")
	}
	seconds, err := strconv.ParseFloat(args[0], 64)
	if err != nil {
		return err
	}
	inFlight, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	size, err := strconv.Atoi(args[2])
	if err != nil {
		return err
	}
	client, err := dial(path)
	if err != nil {
		return err
	}
	defer client.Close()

	length := time.Duration(seconds * float64(time.Second))
	begin := time.Now().Add(length / 10)
	end := begin.Add(length)
	var group sync.WaitGroup
	var lock sync.Mutex
	var all []float64
	var failure error
	for range inFlight {
		group.Add(1)
		go func() {
			defer group.Done()
			request := wrapperspb.Bytes(make([]byte, size))
			var times []float64
			var failed error
			for failed == nil {
				start := time.Now()
				if start.After(end) {
					break
				}
				var reply wrapperspb.BytesValue
				failed = client.Call(context.Background(), service, "Echo", request, &reply)
				if start.After(begin) {
					times = append(times, time.Since(start).Seconds())
				}
			}
			lock.Lock()
			defer lock.Unlock()
			all = append(all, times...)
			if failed != nil {
				failure = failed
			}
		}()
	}
	group.Wait()
	if failure != nil {
		return failure
	}
	if len(all) == 0 {
		return fmt.Errorf("no call ended")
	}
	slices.Sort(all)
	return json.NewEncoder(os.Stdout).Encode(map[string]float64{
		"calls_per_s": float64(len(all)) / seconds,
		"p50_us":      all[len(all)/2] * 1e6,
		"p99_us":      all[len(all)*99/100] * 1e6,
	})
}
