//go:build cluster && linux

// Here belongs what needs a cluster of three servers, each a process of its own: what it costs, and what becomes of messages while servers and
// workers are killed, paused and cut off from each other. It needs root and iproute2, so that it stands behind a build tag: make cluster.
package natsstore_test

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/smtprelay/smtprelay/outbox"
	"github.com/smtprelay/smtprelay/outbox/natsstore/embedded"
	"github.com/smtprelay/smtprelay/outbox/storetest"
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
		n := &node{config: embedded.Config{Dir: filepath.Join(t.TempDir()), Cluster: "cluster", Name: fmt.Sprint("node", i)}}
		if c.nodes[i] = n; apart {
			n.config.Listen, n.config.ListenCluster = nodeIP(i)+":4222", nodeIP(i)+":6222"
		} else {
			n.config.Listen, n.config.ListenCluster = freeAddr(t), freeAddr(t)
		}
		routes = append(routes, n.config.ListenCluster)
	}
	if apart {
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

// go test -tags cluster -run '^$' -bench Cluster -benchtime 5000x
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
