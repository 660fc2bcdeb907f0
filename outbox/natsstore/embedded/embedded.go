// Package embedded runs a NATS server within the program: for tests, and for a machine that needs a store of its own without a
// separate server. It syncs each message to the disk before it acknowledges it, which NATS does not by default.
package embedded

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"strconv"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"

	"github.com/smtprelay/smtprelay/internal/natslog"
)

// Config has the settings of a server.
type Config struct {
	// Dir is the folder of the messages, for this server alone.
	Dir string

	// Listen is the address for clients in other processes, such as "127.0.0.1:4222"; port 0 takes any. "" means none: only Connect
	// reaches the server.
	Listen string

	// For a cluster of three or five: its name, the name of this server, which must stay the same, the address for the other
	// servers, and the addresses of all servers. Listen must be set too.
	Cluster, Name string
	ListenCluster string
	Routes        []string

	// Token, if not "", is required from clients, and from the other servers of the cluster. Without it everybody who can reach an
	// address can read, write and delete mail. For TLS run nats-server.
	Token string
}

// Server is a NATS server in this process.
type Server struct{ server *server.Server }

// startTime is how long a server may take to be ready; one of a cluster does not wait for the others.
const startTime = time.Minute

// Start starts a server; a cluster works once most of its servers run.
func Start(c Config) (*Server, error) {
	o := &server.Options{JetStream: true, StoreDir: c.Dir, SyncAlways: true, ServerName: c.Name, DontListen: c.Listen == "", NoSigs: true, NoLog: true,
		Authorization: c.Token}
	if err := c.addresses(o); err != nil {
		return nil, fmt.Errorf("embedded: %w", err)
	}
	s, err := server.NewServer(o)
	if err != nil {
		return nil, fmt.Errorf("embedded: %w", err)
	}
	s.Start()
	if !s.ReadyForConnections(startTime) {
		s.Shutdown()
		return nil, errors.New("embedded: the server is not ready: is an address in use, or a folder that of another server?")
	}
	return &Server{s}, nil
}

// clusterUser is whom a token of a cluster belongs to.
const clusterUser = "cluster"

func (c Config) addresses(o *server.Options) (err error) {
	if c.Dir == "" {
		return errors.New("Config.Dir is empty")
	}
	if c.Listen != "" {
		if o.Host, o.Port, err = address(c.Listen); err != nil {
			return err
		}
	}
	if c.Cluster == "" {
		return nil
	}
	if c.Name == "" || c.Listen == "" {
		return errors.New("a server of a cluster has a Name, and Listen")
	}
	o.Cluster.Name = c.Cluster
	if o.Cluster.Host, o.Cluster.Port, err = address(c.ListenCluster); err != nil {
		return err
	}
	if c.Token != "" {
		o.Cluster.Username, o.Cluster.Password = clusterUser, c.Token
	}
	for _, r := range c.Routes {
		u := &url.URL{Scheme: "nats", Host: r}
		if c.Token != "" {
			u.User = url.UserPassword(clusterUser, c.Token)
		}
		o.Routes = append(o.Routes, u)
	}
	return nil
}

func address(s string) (host string, port int, err error) {
	host, text, err := net.SplitHostPort(s)
	if err != nil {
		return "", 0, err
	}
	if port, err = strconv.Atoi(text); err != nil {
		return "", 0, err
	}
	if port == 0 {
		port = server.RANDOM_PORT
	}
	return host, port, nil
}

// Connect returns a connection to the server, without a socket.
func (s *Server) Connect(more ...nats.Option) (*nats.Conn, error) {
	return nats.Connect("", append(append(natslog.Options(), nats.InProcessServer(s.server)), more...)...)
}

// URL returns the URL for clients in other processes.
func (s *Server) URL() string { return s.server.ClientURL() }

// Close stops the server, and returns when it has stopped.
func (s *Server) Close() {
	s.server.Shutdown()
	s.server.WaitForShutdown()
}
