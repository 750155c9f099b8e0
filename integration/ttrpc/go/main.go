// SPDX-License-Identifier: Apache-2.0

// ttrpcpeer is the Go end of the interop tests and of the benchmark.
//
//	ttrpcpeer serve SOCKET              serve until stdin ends
//	ttrpcpeer check SOCKET              run every client check, one line of JSON each
//	ttrpcpeer bench SOCKET SECONDS IN_FLIGHT BYTES   measure Echo, one line of JSON
package main

import (
	"fmt"
	"os"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "ttrpcpeer:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) < 2 {
		return fmt.Errorf("usage: ttrpcpeer serve|check|bench SOCKET …")
	}
	switch args[0] {
	case "serve":
		return serve(args[1])
	case "check":
		return check(args[1])
	case "bench":
		return bench(args[1], args[2:])
	}
	return fmt.Errorf("unknown command %q", args[0])
}
