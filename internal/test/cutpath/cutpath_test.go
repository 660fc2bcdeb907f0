//go:build cutpath && linux

// Package cutpath sends over a path that is really cut: client, router and relay are in separate network namespaces, and the
// router stops forwarding. It needs root and iproute2, so it has a build tag: make cutpath.
//
// These tests need a kernel: a packet lost without a trace, and a full window.
package cutpath

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/internal/relaytest"
)

// namespace is a network namespace with one thread in it. A socket stays in the namespace in which it was created.
type namespace struct {
	todo chan func()
	tid  int
}

func newNamespace(t *testing.T) *namespace {
	ns := &namespace{todo: make(chan func())}
	ready := make(chan error)
	go func() { // ends with the test, and its thread too, because it is not unlocked
		runtime.LockOSThread()
		err := syscall.Unshare(syscall.CLONE_NEWNET)
		ns.tid = syscall.Gettid()
		ready <- err
		for f := range ns.todo {
			f()
		}
	}()
	if err := <-ready; err != nil {
		t.Fatalf("no network namespace: %v (this test needs root)", err)
	}
	t.Cleanup(func() { close(ns.todo) })
	ns.ip(t, "link set lo up")
	return ns
}

// do runs f in the namespace.
func (ns *namespace) do(f func()) {
	done := make(chan struct{})
	ns.todo <- func() { defer close(done); f() }
	<-done
}

// ip runs an ip command in the namespace.
func (ns *namespace) ip(t *testing.T, command string) {
	t.Helper()
	ns.do(func() {
		if out, err := exec.Command("ip", strings.Fields(command)...).CombinedOutput(); err != nil {
			t.Errorf("ip %s: %v %s", command, err, out)
		}
	})
}

// path is a relay behind a router.
type path struct {
	client, router *namespace
	listener       net.Listener
}

const relayIP = "10.99.2.2"

func newPath(t *testing.T, serve func(net.Conn)) *path {
	p := &path{client: newNamespace(t), router: newNamespace(t)}
	relay := newNamespace(t)
	p.router.ip(t, fmt.Sprintf("link add c0 type veth peer name eth0 netns %d", p.client.tid))
	p.router.ip(t, fmt.Sprintf("link add r0 type veth peer name eth0 netns %d", relay.tid))
	for _, c := range []string{"addr add 10.99.1.1/24 dev c0", "addr add 10.99.2.1/24 dev r0", "link set c0 up", "link set r0 up"} {
		p.router.ip(t, c)
	}
	for _, c := range []string{"addr add 10.99.1.2/24 dev eth0", "link set eth0 up", "route add default via 10.99.1.1"} {
		p.client.ip(t, c)
	}
	for _, c := range []string{"addr add " + relayIP + "/24 dev eth0", "link set eth0 up", "route add default via 10.99.2.1"} {
		relay.ip(t, c)
	}
	p.forward(t, true)
	relay.do(func() {
		var err error
		if p.listener, err = net.Listen("tcp", relayIP+":25"); err != nil {
			t.Fatal(err)
		}
	})
	t.Cleanup(func() { p.listener.Close() })
	go func() { // ends when the listener is closed
		for {
			c, err := p.listener.Accept()
			if err != nil {
				return
			}
			go serve(c) // ends with the connection
		}
	}()
	return p
}

// forward switches forwarding on or off.
func (p *path) forward(t *testing.T, yes bool) {
	t.Helper()
	value := "0"
	if yes {
		value = "1"
	}
	p.router.do(func() {
		if err := os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte(value), 0); err != nil {
			t.Errorf("ip_forward: %v", err)
		}
	})
}

// dial is Config.Dial from the client's namespace. With hide the client does not see the socket.
func (p *path) dial(hide bool, control func(network, address string, c syscall.RawConn) error) func(context.Context, string, string) (net.Conn, error) {
	return func(ctx context.Context, network, addr string) (nc net.Conn, err error) {
		p.client.do(func() {
			nc, err = (&net.Dialer{Control: control, Timeout: time.Second}).DialContext(ctx, network, addr)
		})
		if err == nil && hide {
			nc = struct{ net.Conn }{nc}
		}
		return nc, err
	}
}

func message() smtprelay.Message {
	return smtprelay.Message{From: "a@x.example", To: []string{"b@y.example"}, Body: smtprelay.Bytes([]byte("Subject: x\r\n\r\nhello\r\n"))}
}

// A cut under a warm connection is noticed after Timeouts.Unacked, and the message takes another connection once the path works
// again. The other limits would take half a minute.
func TestCutPathUnderAWarmConnectionIsNoticed(t *testing.T) {
	for name, hide := range map[string]bool{"by the client": false, "by the Control of the caller's dialer": true} {
		t.Run(name, func(t *testing.T) {
			relay := &relaytest.Relay{Answer: func(_ int, line string) string { return relaytest.Agree("250 PIPELINING", line) }}
			var conns atomic.Int64
			p := newPath(t, func(c net.Conn) { relay.Serve(c, int(conns.Add(1))) })
			closed := make(chan smtprelay.ConnClosedInfo, 10)
			cfg := smtprelay.Config{
				Addr: relayIP + ":25", TLS: smtprelay.TLSNone, LocalName: "client.example",
				Trace: &smtprelay.Trace{ConnClosed: func(_ context.Context, i smtprelay.ConnClosedInfo) { closed <- i }},
			}
			var control func(network, address string, c syscall.RawConn) error
			if cfg.Timeouts.Unacked = time.Second; hide {
				control = smtprelay.DialControl(time.Second)
			}
			cfg.Dial = p.dial(hide, control)
			client, err := smtprelay.New(cfg)
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			if _, err := client.Send(t.Context(), message()); err != nil {
				t.Fatal(err)
			}
			p.forward(t, false)
			ctx, cancel := context.WithTimeout(t.Context(), 15*time.Second)
			defer cancel()
			sent := make(chan error, 1)
			go func() { _, err := client.Send(ctx, message()); sent <- err }()
			select {
			case i := <-closed:
				if !errors.Is(i.Err, syscall.ETIMEDOUT) {
					t.Errorf("the connection was closed for %v, want %v", i.Err, syscall.ETIMEDOUT)
				}
			case err := <-sent:
				t.Errorf("Send returned before the connection ended: %v", err)
			}
			p.forward(t, true)
			if err := <-sent; err != nil {
				t.Errorf("after the path was restored: %v", err)
			}
		})
	}
}

// A live relay that reads nothing for longer than Timeouts.Unacked keeps its connection: its window is full, and its kernel says
// so.
func TestFullWindowIsNoCutPath(t *testing.T) {
	goOn := make(chan struct{})
	var conns atomic.Int64
	relay := &relaytest.Relay{Window: 1, Answer: func(_ int, line string) string {
		if line == "DATA" {
			time.AfterFunc(4*time.Second, func() { close(goOn) })
		}
		return relaytest.Agree("250 PIPELINING", line)
	}}
	relay.Body = waitingWriter{goOn}
	p := newPath(t, func(c net.Conn) {
		c.(*net.TCPConn).SetReadBuffer(16 << 10)
		relay.Serve(c, int(conns.Add(1)))
	})
	cfg := smtprelay.Config{Addr: relayIP + ":25", TLS: smtprelay.TLSNone, LocalName: "client.example", Dial: p.dial(false, nil)}
	cfg.Timeouts.Unacked = time.Second
	client, err := smtprelay.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	m := message()
	m.Body = smtprelay.Bytes([]byte("Subject: x\r\n\r\n" + strings.Repeat(strings.Repeat("x", 70)+"\r\n", 30_000)))
	if _, err := client.Send(t.Context(), m); err != nil {
		t.Error(err)
	}
	if n := conns.Load(); n != 1 {
		t.Errorf("%d connections, want 1", n)
	}
}

// waitingWriter writes nothing before goOn is closed.
type waitingWriter struct{ goOn chan struct{} }

func (w waitingWriter) Write(p []byte) (int, error) {
	<-w.goOn
	return len(p), nil
}
