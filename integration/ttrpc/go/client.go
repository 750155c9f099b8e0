// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

func dial(path string) (*ttrpc.Client, error) {
	connection, err := net.Dial("unix", path)
	if err != nil {
		return nil, err
	}
	return ttrpc.NewClient(connection), nil
}

var checks = []struct {
	name string
	run  func(context.Context, *ttrpc.Client) error
}{
	{"unary", checkUnary},
	{"status with details", checkStatus},
	{"unknown method", func(ctx context.Context, c *ttrpc.Client) error {
		return expect(codes.Unimplemented, c.Call(ctx, service, "Nonesuch", wrapperspb.String(""), &wrapperspb.StringValue{}))
	}},
	{"unknown service", func(ctx context.Context, c *ttrpc.Client) error {
		return expect(codes.Unimplemented, c.Call(ctx, "no.Service", "Echo", wrapperspb.String(""), &wrapperspb.StringValue{}))
	}},
	{"metadata", checkMetadata},
	{"deadline passed on", checkDeadline},
	{"deadline enforced", func(ctx context.Context, c *ttrpc.Client) error {
		ctx, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
		defer cancel()
		err := c.Call(ctx, service, "Sleep", wrapperspb.Double(30), &wrapperspb.StringValue{})
		if !errors.Is(err, context.DeadlineExceeded) && status.Code(err) != codes.DeadlineExceeded {
			return fmt.Errorf("got %v", err)
		}
		return nil
	}},
	{"answer too large", func(ctx context.Context, c *ttrpc.Client) error {
		return expect(codes.ResourceExhausted, c.Call(ctx, service, "Make", wrapperspb.Int64(4<<20), &wrapperspb.BytesValue{}))
	}},
	{"largest answer", func(ctx context.Context, c *ttrpc.Client) error {
		return sized(ctx, c, "Make", wrapperspb.Int64(4<<20-10), 4<<20-10)
	}},
	{"largest request", func(ctx context.Context, c *ttrpc.Client) error {
		size := 4<<20 - 50
		return sized(ctx, c, "Echo", wrapperspb.Bytes(make([]byte, size)), size)
	}},
	{"client stream", checkSum},
	{"server stream", checkCount},
	{"server stream fails", checkCountFails},
	{"both stream", checkChat},
	{"many in flight", checkMany},
}

func expect(code codes.Code, err error) error {
	if status.Code(err) != code {
		return fmt.Errorf("wanted %v, got %v", code, err)
	}
	return nil
}

func sized(ctx context.Context, c *ttrpc.Client, method string, request proto.Message, size int) error {
	var reply wrapperspb.BytesValue
	if err := c.Call(ctx, service, method, request, &reply); err != nil {
		return err
	}
	if len(reply.Value) != size {
		return fmt.Errorf("got %d bytes", len(reply.Value))
	}
	return nil
}

func checkUnary(ctx context.Context, c *ttrpc.Client) error {
	return sized(ctx, c, "Echo", wrapperspb.Bytes([]byte("hello")), 5)
}

func checkStatus(ctx context.Context, c *ttrpc.Client) error {
	err := c.Call(ctx, service, "Fail", wrapperspb.String("no such thing"), &wrapperspb.StringValue{})
	if err := expect(codes.NotFound, err); err != nil {
		return err
	}
	got := status.Convert(err)
	if got.Message() != "no such thing" || len(got.Details()) != 1 {
		return fmt.Errorf("got %q with %v", got.Message(), got.Details())
	}
	if detail, ok := got.Details()[0].(*wrapperspb.StringValue); !ok || detail.Value != "a detail" {
		return fmt.Errorf("got the detail %v", got.Details()[0])
	}
	return nil
}

func checkMetadata(ctx context.Context, c *ttrpc.Client) error {
	ctx = ttrpc.WithMetadata(ctx, ttrpc.MD{"key": []string{"one", "two"}, "other": []string{"three"}})
	var reply wrapperspb.StringValue
	if err := c.Call(ctx, service, "Metadata", wrapperspb.String("key"), &reply); err != nil {
		return err
	}
	if reply.Value != "one,two" {
		return fmt.Errorf("got %q", reply.Value)
	}
	return nil
}

func checkDeadline(ctx context.Context, c *ttrpc.Client) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	var reply wrapperspb.DoubleValue
	if err := c.Call(ctx, service, "Deadline", wrapperspb.String(""), &reply); err != nil {
		return err
	}
	if reply.Value < 10 || reply.Value > 20 {
		return fmt.Errorf("the server saw %v s", reply.Value)
	}
	return nil
}

func checkSum(ctx context.Context, c *ttrpc.Client) error {
	stream, err := c.NewStream(ctx, &ttrpc.StreamDesc{StreamingClient: true}, service, "Sum", nil)
	if err != nil {
		return err
	}
	for number := range int64(1000) {
		if err := stream.SendMsg(wrapperspb.Int64(number)); err != nil {
			return err
		}
	}
	if err := stream.CloseSend(); err != nil {
		return err
	}
	var sum wrapperspb.Int64Value
	if err := stream.RecvMsg(&sum); err != nil {
		return err
	}
	if sum.Value != 499500 {
		return fmt.Errorf("got %d", sum.Value)
	}
	return nil
}

func checkCount(ctx context.Context, c *ttrpc.Client) error {
	stream, err := c.NewStream(ctx, &ttrpc.StreamDesc{StreamingServer: true}, service, "Count", wrapperspb.Int64(1000))
	if err != nil {
		return err
	}
	for want := range int64(1000) {
		var number wrapperspb.Int64Value
		if err := stream.RecvMsg(&number); err != nil {
			return err
		}
		if number.Value != want {
			return fmt.Errorf("got %d for %d", number.Value, want)
		}
	}
	if err := stream.RecvMsg(&wrapperspb.Int64Value{}); !errors.Is(err, io.EOF) {
		return fmt.Errorf("got %v at the end", err)
	}
	return nil
}

func checkCountFails(ctx context.Context, c *ttrpc.Client) error {
	stream, err := c.NewStream(ctx, &ttrpc.StreamDesc{StreamingServer: true}, service, "Count", wrapperspb.Int64(-1))
	if err != nil {
		return err
	}
	return expect(codes.OutOfRange, stream.RecvMsg(&wrapperspb.Int64Value{}))
}

func checkChat(ctx context.Context, c *ttrpc.Client) error {
	both := &ttrpc.StreamDesc{StreamingClient: true, StreamingServer: true}
	stream, err := c.NewStream(ctx, both, service, "Chat", nil)
	if err != nil {
		return err
	}
	for number := range 100 {
		if err := stream.SendMsg(wrapperspb.String(fmt.Sprint("word", number))); err != nil {
			return err
		}
		var reply wrapperspb.StringValue
		if err := stream.RecvMsg(&reply); err != nil {
			return err
		}
		if reply.Value != fmt.Sprint("WORD", number) {
			return fmt.Errorf("got %q", reply.Value)
		}
	}
	if err := stream.CloseSend(); err != nil {
		return err
	}
	if err := stream.RecvMsg(&wrapperspb.StringValue{}); !errors.Is(err, io.EOF) {
		return fmt.Errorf("got %v at the end", err)
	}
	return nil
}

func checkMany(ctx context.Context, c *ttrpc.Client) error {
	var group sync.WaitGroup
	failures := make(chan error, 200)
	for number := range 200 {
		group.Add(1)
		go func() {
			defer group.Done()
			failures <- sized(ctx, c, "Echo", wrapperspb.Bytes(make([]byte, number*100)), number*100)
		}()
	}
	group.Wait()
	close(failures)
	for err := range failures {
		if err != nil {
			return err
		}
	}
	return nil
}

// check runs all checks over one connection: a failed call must not harm it.
func check(path string) error {
	client, err := dial(path)
	if err != nil {
		return err
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	out := json.NewEncoder(os.Stdout)
	for _, check := range checks {
		text := ""
		if err := check.run(ctx, client); err != nil {
			text = err.Error()
		}
		if err := out.Encode(map[string]string{"check": check.name, "error": text}); err != nil {
			return err
		}
	}
	return nil
}
