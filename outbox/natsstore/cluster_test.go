//go:build cluster && linux

// Here belongs what needs a cluster of three servers, each a process of its own: what it costs, and what becomes of messages while servers and
// workers are killed, paused and cut off from each other. It needs root and iproute2, so that it stands behind a build tag: make cluster.
package natsstore_test

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/outbox"
	"github.com/smtprelay/smtprelay/outbox/natsstore/embedded"
	"github.com/smtprelay/smtprelay/outbox/storetest"
	"github.com/smtprelay/smtprelay/smtptest"
)

var (
	clusterMessages = flag.Int("cluster.messages", 5000, "how many messages are sent while servers and workers fail, at most")
	clusterTime     = flag.Duration("cluster.time", 15*time.Minute, "after which time no more are enqueued")
	clusterIntents  = flag.String("cluster.intents", "at end", `how workers write intents: "at end", "early", or "none", with which some are sent twice`)
)

const nodes = 3

// cluster is the servers.
type cluster struct {
	t     testing.TB
	apart bool // each is in a network namespace of its own
	nodes [nodes]*node
}

type node struct {
	config embedded.Config
	cmd    *exec.Cmd
	input  io.Closer
}

func newCluster(t testing.TB, apart bool) *cluster {
	c := &cluster{t: t, apart: apart}
	var routes []string
	for i := range nodes {
		n := &node{config: embedded.Config{Dir: t.TempDir(), Cluster: "cluster", Name: fmt.Sprint("node", i)}}
		if c.nodes[i] = n; apart {
			n.config.Listen, n.config.ListenCluster = nodeIP(i)+":4222", nodeIP(i)+":6222"
		} else {
			n.config.Listen, n.config.ListenCluster = freeAddr(t), freeAddr(t)
		}
		routes = append(routes, n.config.ListenCluster)
	}
	if apart {
		if all, err := net.Interfaces(); err != nil || len(all) > 1 {
			t.Fatalf("this is no network namespace of our own: make cluster; %v", err)
		}
		c.must(os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0))
	}
	t.Cleanup(func() {
		for i := range nodes {
			c.kill(i)
		}
	})
	for i, n := range c.nodes {
		n.config.Routes = routes
		c.start(i)
	}
	return c
}

func (c *cluster) must(err error) {
	c.t.Helper()
	if err != nil {
		c.t.Fatal(err)
	}
}

func (c *cluster) url() string {
	var urls []string
	for _, n := range c.nodes {
		urls = append(urls, "nats://"+n.config.Listen)
	}
	return strings.Join(urls, ",")
}

func (c *cluster) processes() (pids []int) {
	for _, n := range c.nodes {
		pids = append(pids, n.cmd.Process.Pid)
	}
	return pids
}

func nodeIP(i int) string { return fmt.Sprintf("10.77.%d.2", i) }

func freeAddr(t testing.TB) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func (c *cluster) start(i int) {
	n := c.nodes[i]
	text, err := json.Marshal(n.config)
	c.must(err)
	n.cmd = exec.Command(os.Args[0])
	n.cmd.Env = append(os.Environ(), "NATSSTORE_NODE="+string(text))
	n.cmd.Stderr = os.Stderr
	if c.apart {
		n.cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	}
	input, err := n.cmd.StdinPipe()
	c.must(err)
	c.must(n.cmd.Start())
	n.input = input
	if c.apart {
		host := fmt.Sprintf("node%d", i)
		c.ip("link add %s type veth peer name eth0 netns %d", host, n.cmd.Process.Pid)
		c.ip("addr add 10.77.%d.1/24 dev %s", i, host)
		c.ip("link set %s up", host)
		for _, command := range []string{"link set lo up", "addr add " + nodeIP(i) + "/24 dev eth0", "link set eth0 up", fmt.Sprintf("route add default via 10.77.%d.1", i)} {
			c.inside(i, command)
		}
	}
	_, err = io.WriteString(input, "\n") // its network is there
	c.must(err)
}

func (c *cluster) ip(format string, args ...any) {
	c.t.Helper()
	c.run("ip", fmt.Sprintf(format, args...))
}

// inside runs an ip command in the namespace of a server.
func (c *cluster) inside(i int, command string) {
	c.t.Helper()
	c.run("nsenter", fmt.Sprintf("-t %d -n ip %s", c.nodes[i].cmd.Process.Pid, command))
}

func (c *cluster) run(program, args string) {
	c.t.Helper()
	if out, err := exec.Command(program, strings.Fields(args)...).CombinedOutput(); err != nil {
		c.t.Fatalf("%s %s: %v %s", program, args, err, out)
	}
}

func (c *cluster) kill(i int) {
	if n := c.nodes[i]; n.cmd != nil {
		_ = n.cmd.Process.Kill()
		_ = n.cmd.Wait()
		_ = n.input.Close()
		n.cmd = nil
		for c.apart { // its namespace goes a moment later, and its interface with it
			if _, err := net.InterfaceByName(fmt.Sprintf("node%d", i)); err != nil {
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
}

// go test -tags cluster -run '^$' -bench Cluster -benchtime 4000x
func BenchmarkCluster(b *testing.B) {
	c := newCluster(b, false)
	var stores atomic.Int64
	storetest.Delivered(b, func(b *testing.B) outbox.Store {
		s, err := openPlace(fmt.Sprintf("%s outbox%d %d 5s", c.url(), stores.Add(1), nodes))
		if err != nil {
			b.Fatal(err)
		}
		return s
	}, c.processes()...)
}

// outage is how long a server is away, and a worker is paused: longer than a lease.
const outage = 8 * time.Second

func TestNothingIsLostAndNothingSentTwiceWhileServersAndWorkersFail(t *testing.T) {
	relay := smtptest.New(t, func(s *smtptest.Server) {
		s.NoTLS, s.NoAuth, s.DropBodies, s.MaxConns, s.MaxMessages, s.Delay = true, true, true, -1, -1, 5*time.Millisecond
	})
	c := newCluster(t, true)
	place := fmt.Sprintf("%s outbox %d 5s", c.url(), nodes)
	var store outbox.Store
	for err := error(nil); store == nil; { // until there is a leader
		if store, err = openPlace(place); err != nil {
			t.Log(err)
		}
	}
	defer store.Close()
	box, err := outbox.New(outbox.Config{Store: store, Client: relay.Client(t)})
	c.must(err)
	var team [3]*worker
	for i := range team {
		team[i] = employ(t, place, relay.Addr())
	}
	begun := time.Now()
	enqueued := make(chan struct{})
	messages := 0 // valid once enqueued is closed
	go func() {   // ends when all are durable
		defer close(enqueued)
		for ; messages < *clusterMessages && time.Since(begun) < *clusterTime; messages += enqueueTogether {
			enqueueSome(t.Context(), box, messages)
			for relay.Stats().Accepted < messages-backlog && t.Context().Err() == nil {
				time.Sleep(10 * time.Millisecond)
			}
		}
		t.Logf("%4.0f s: %d are enqueued, and the relay has %d", time.Since(begun).Seconds(), messages, relay.Stats().Accepted)
	}()

	over := make(chan struct{})
	go func() { // ends when nothing is left to be sent
		defer close(over)
		<-enqueued
		for left := 1; left > 0; time.Sleep(500 * time.Millisecond) {
			if s, err := box.Stats(t.Context()); err == nil {
				left = s.Stored.Queued + s.Stored.Sending
			}
		}
	}()
	failures := c.failures(team[:])
	names := slices.Sorted(maps.Keys(failures))
	done := map[string]int{}
	for running := true; running; {
		// Not before some have got through.
		for had := relay.Stats().Accepted; running && relay.Stats().Accepted < had+rand.IntN(200); {
			select {
			case <-over:
				running = false
			case <-time.After(10 * time.Millisecond):
			}
		}
		if running {
			name := names[rand.IntN(len(names))]
			t.Logf("%4.0f s: the relay has %d; %s", time.Since(begun).Seconds(), relay.Stats().Accepted, name)
			failures[name]()
			done[name]++
		}
	}
	t.Logf("%4.0f s: nothing is left to be sent", time.Since(begun).Seconds())
	for _, w := range team {
		w.leave()
	}
	for _, name := range names {
		t.Logf("%4d times: %s", done[name], name)
	}
	settle(t, box, relay, messages)
}

const (
	enqueueTogether = 64
	backlog         = 5000 // messages that are enqueued and not sent, at most
)

// enqueueSome enqueues messages from that number on, until each is durable.
func enqueueSome(ctx context.Context, box *outbox.Outbox, first int) {
	for left := enqueueTogether; left > 0 && ctx.Err() == nil; {
		left = 0
		for _, err := range box.EnqueueAll(ctx, func(yield func(outbox.Message) bool) {
			for i := range enqueueTogether {
				if !yield(clusterMessage(first + i)) {
					return
				}
			}
		}) {
			if err != nil {
				left++ // it may be there all the same; the same ID again is nothing
			}
		}
	}
}

func clusterMessage(i int) outbox.Message {
	return outbox.Message{ID: fmt.Sprint(i), From: "a@x.example", To: []string{fmt.Sprintf("b%d@y.example", i)},
		Body: smtprelay.Bytes(fmt.Appendf(nil, "Subject: %d\r\n\r\n%s", i, strings.Repeat("It is ready.\r\n", 100)))}
}

// failures is what may happen. Each returns when it is over.
func (c *cluster) failures(team []*worker) map[string]func() {
	anyNode := func() int { return rand.IntN(nodes) }
	anyWorker := func() *worker { return team[rand.IntN(len(team))] }
	pause := func(p *os.Process) {
		_ = p.Signal(syscall.SIGSTOP)
		time.Sleep(outage)
		_ = p.Signal(syscall.SIGCONT)
	}
	return map[string]func(){
		"a worker is killed": func() { anyWorker().kill() },
		"a worker is paused": func() { pause(anyWorker().process()) },
		"a server is killed": func() {
			i := anyNode()
			c.kill(i)
			time.Sleep(rand.N(outage))
			c.start(i)
		},
		"a server is paused": func() { pause(c.nodes[anyNode()].cmd.Process) },
		"all servers are killed at once": func() {
			for i := range nodes {
				c.kill(i)
			}
			for i := range nodes {
				c.start(i)
			}
		},
		"a server and a worker are killed": func() {
			i := anyNode()
			c.kill(i)
			anyWorker().kill()
			c.start(i)
		},
		"a server is cut off from all": func() {
			i := anyNode()
			c.ip("link set node%d down", i)
			time.Sleep(outage)
			c.ip("link set node%d up", i)
		},
		"two servers are cut off from each other": func() {
			one := anyNode()
			other := (one + 1) % nodes
			for _, command := range []string{"add", "del"} {
				c.inside(one, fmt.Sprintf("route %s blackhole %s/32", command, nodeIP(other)))
				c.inside(other, fmt.Sprintf("route %s blackhole %s/32", command, nodeIP(one)))
				if command == "add" {
					time.Sleep(outage)
				}
			}
		},
	}
}

// worker is a process that is there again when it has ended.
type worker struct {
	mu    sync.Mutex
	cmd   *exec.Cmd
	input io.Closer
	left  bool
	gone  chan struct{}
}

func employ(t *testing.T, place, addr string) *worker {
	w := &worker{gone: make(chan struct{})}
	begin := func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.cmd = storetest.Process(*clusterIntents, place, addr)
		w.cmd.Stderr = io.Discard // that it does not find the servers, while they are away
		var err error
		if w.input, err = w.cmd.StdinPipe(); err == nil {
			err = w.cmd.Start()
		}
		if err != nil {
			t.Error(err)
		}
		return err == nil && !w.left
	}
	if !begin() {
		t.FailNow()
	}
	go func() { // ends with leave
		defer close(w.gone)
		for {
			_ = w.cmd.Wait()
			w.mu.Lock()
			left := w.left
			w.mu.Unlock()
			if left || !begin() {
				return
			}
		}
	}()
	t.Cleanup(func() { w.leave(); w.kill() })
	return w
}

func (w *worker) process() *os.Process {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.cmd.Process
}

func (w *worker) kill() { _ = w.process().Kill() }

// leave ends the worker well.
func (w *worker) leave() {
	w.mu.Lock()
	w.left = true
	_ = w.input.Close()
	w.mu.Unlock()
	<-w.gone
}

// settle compares what the store says with what the relay has.
func settle(t *testing.T, box *outbox.Outbox, relay *smtptest.Server, messages int) {
	got := map[string]int{}
	for _, m := range relay.Messages() {
		got[m.To[0]]++
	}
	states := map[string]outbox.Item{}
	for _, state := range []outbox.State{outbox.Queued, outbox.Sending, outbox.Dead, outbox.Unknown, outbox.Cancelled, outbox.Accepted} {
		for i, err := range box.List(t.Context(), state) {
			if err != nil {
				t.Fatal(err)
			}
			states[i.ID] = i
		}
	}
	var twice, lost, unknown, unknownSent int
	for i := range messages {
		m := clusterMessage(i)
		n := got[m.To[0]]
		item, ok := states[m.ID]
		switch {
		case n > 1:
			twice++
			t.Errorf("%s: the relay has it %d times, and it is %v: %s", m.ID, n, item.State, item.Reason)
		case ok && item.State == outbox.Unknown:
			unknown++
			unknownSent += n
			t.Logf("%s is unknown, and the relay has it %d times: %s", m.ID, n, item.Reason)
		case !ok || item.State != outbox.Accepted || n == 0:
			lost++
			t.Errorf("%s: the relay has it %d times, and it is known: %t, %v: %s", m.ID, n, ok, item.State, item.Reason)
		}
	}
	t.Logf("%d messages: %d lost, %d twice, %d unknown, of which the relay has %d", messages, lost, twice, unknown, unknownSent)
}
