// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"time"

	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

const service = "pykata.test.Echo"

// unary makes a ttrpc method of a function from one message to another.
func unary[Q any, PQ interface {
	*Q
	proto.Message
}](function func(context.Context, PQ) (proto.Message, error)) ttrpc.Method {
	return func(ctx context.Context, unmarshal func(interface{}) error) (interface{}, error) {
		request := PQ(new(Q))
		if err := unmarshal(request); err != nil {
			return nil, err
		}
		return function(ctx, request)
	}
}

var methods = map[string]ttrpc.Method{
	"Echo": unary(func(_ context.Context, q *wrapperspb.BytesValue) (proto.Message, error) {
		return q, nil
	}),
	"Make": unary(func(_ context.Context, q *wrapperspb.Int64Value) (proto.Message, error) {
		return wrapperspb.Bytes(make([]byte, q.Value)), nil
	}),
	"Fail": unary(func(_ context.Context, q *wrapperspb.StringValue) (proto.Message, error) {
		failed, err := status.New(codes.NotFound, q.Value).WithDetails(wrapperspb.String("a detail"))
		if err != nil {
			return nil, err
		}
		return nil, failed.Err()
	}),
	"Metadata": unary(func(ctx context.Context, q *wrapperspb.StringValue) (proto.Message, error) {
		metadata, _ := ttrpc.GetMetadata(ctx)
		values, _ := metadata.Get(q.Value)
		return wrapperspb.String(strings.Join(values, ",")), nil
	}),
	"Deadline": unary(func(ctx context.Context, _ *wrapperspb.StringValue) (proto.Message, error) {
		deadline, _ := ctx.Deadline()
		return wrapperspb.Double(time.Until(deadline).Seconds()), nil
	}),
	"Sleep": unary(func(ctx context.Context, q *wrapperspb.DoubleValue) (proto.Message, error) {
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(time.Duration(q.Value * float64(time.Second))):
			return wrapperspb.String("slept"), nil
		}
	}),
}

var streams = map[string]ttrpc.Stream{
	"Sum": {
		StreamingClient: true,
		Handler: func(_ context.Context, s ttrpc.StreamServer) (interface{}, error) {
			var sum int64
			for {
				var message wrapperspb.Int64Value
				if err := s.RecvMsg(&message); err != nil {
					if errors.Is(err, io.EOF) {
						return wrapperspb.Int64(sum), nil
					}
					return nil, err
				}
				sum += message.Value
			}
		},
	},
	"Count": {
		StreamingServer: true,
		Handler: func(_ context.Context, s ttrpc.StreamServer) (interface{}, error) {
			var count wrapperspb.Int64Value
			if err := s.RecvMsg(&count); err != nil {
				return nil, err
			}
			if count.Value < 0 {
				return nil, status.Error(codes.OutOfRange, "below zero")
			}
			for number := range count.Value {
				if err := s.SendMsg(wrapperspb.Int64(number)); err != nil {
					return nil, err
				}
			}
			return nil, nil
		},
	},
	"Chat": {
		StreamingClient: true,
		StreamingServer: true,
		Handler: func(_ context.Context, s ttrpc.StreamServer) (interface{}, error) {
			for {
				var message wrapperspb.StringValue
				if err := s.RecvMsg(&message); err != nil {
					if errors.Is(err, io.EOF) {
						return nil, nil
					}
					return nil, err
				}
				if err := s.SendMsg(wrapperspb.String(strings.ToUpper(message.Value))); err != nil {
					return nil, err
				}
			}
		},
	},
}

// serve listens on a socket, says so on stdout and serves until stdin ends.
func serve(path string) error {
	server, err := ttrpc.NewServer()
	if err != nil {
		return err
	}
	server.RegisterService(service, &ttrpc.ServiceDesc{Methods: methods, Streams: streams})
	listener, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	go func() {
		io.Copy(io.Discard, os.Stdin)
		server.Close()
	}()
	os.Stdout.WriteString("ready\n")
	err = server.Serve(context.Background(), listener)
	if errors.Is(err, ttrpc.ErrServerClosed) {
		return nil
	}
	return err
}
