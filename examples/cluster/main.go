// Cluster sends from several machines through one outbox in NATS JetStream, with one shared limit of connections.
//
//	go run ./examples/cluster
//
// shows it on this machine: three NATS servers and three workers run as processes, and a fake relay counts. One worker and one
// server are killed in the middle; at the end a table shows the outcome of the messages.
//
// Run the same code against your own cluster, whose servers need sync_interval: always, on any number of machines:
//
//	export NATS_URL=nats://one:4222,nats://two:4222,nats://three:4222
//	SMTP_URL=smtps://apikey:KEY@smtp.sendgrid.net:465 go run ./examples/cluster worker
//	go run ./examples/cluster enqueue -id order-1234 -from shop@example.com -to ann@example.org
//	go run ./examples/cluster list
//
// Ctrl-C or SIGTERM shuts a worker down without leaving an unknown message.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/natsslots"
	"github.com/smtprelay/smtprelay/outbox"
	"github.com/smtprelay/smtprelay/outbox/natsstore"
	"github.com/smtprelay/smtprelay/outbox/natsstore/embedded"
)

const (
	replicas    = 3
	connections = 10 // the relay's limit, for all workers together
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		slog.Error(err.Error())
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("cluster", flag.ExitOnError)
	url := flags.String("nats", os.Getenv("NATS_URL"), "URLs of the NATS servers")
	id := flags.String("id", "", "enqueue: the ID")
	from := flags.String("from", "", "enqueue: from whom")
	to := flags.String("to", "", "enqueue: recipients, separated by commas")
	var server embedded.Config // for a server of the demo
	flags.StringVar(&server.Dir, "dir", "", "node: folder")
	flags.StringVar(&server.Name, "name", "", "node: name")
	flags.StringVar(&server.Listen, "listen", "", "node: address for clients")
	flags.StringVar(&server.ListenCluster, "cluster", "", "node: address for servers")
	routes := flags.String("routes", "", "node: addresses of all servers")
	child := flags.Bool("child", false, "end when the standard input does")
	role := "demo"
	if len(args) > 0 && !strings.HasPrefix(args[0], "-") {
		role, args = args[0], args[1:]
	}
	if err := flags.Parse(args); err != nil {
		return err
	}
	if *child {
		var cancel context.CancelFunc
		ctx, cancel = context.WithCancel(ctx)
		go func() { // ends with the process
			_, _ = io.Copy(io.Discard, os.Stdin)
			cancel()
		}()
	}
	if role != "demo" && role != "node" && *url == "" {
		return errors.New("NATS_URL is not set")
	}
	switch role {
	case "demo":
		return demo(ctx, os.Stdout, 3000)
	case "node":
		server.Cluster, server.Routes = "demo", strings.Split(*routes, ",")
		return node(ctx, server)
	case "worker":
		return worker(ctx, *url, os.Getenv("SMTP_URL"))
	case "enqueue":
		return withBox(*url, func(box *outbox.Outbox) error {
			text := fmt.Sprintf("From: <%s>\r\nTo: <%s>\r\nSubject: Your order\r\nDate: %s\r\n\r\nThank you.\r\n", *from, *to, time.Now().Format(time.RFC1123Z))
			return box.Enqueue(ctx, outbox.Message{ID: *id, From: *from, To: strings.Split(*to, ","), Body: smtprelay.Bytes([]byte(text))})
		})
	case "list":
		return withBox(*url, func(box *outbox.Outbox) error { return list(ctx, box) })
	}
	return fmt.Errorf("unknown command %q: want worker, enqueue or list", role)
}

// node runs a NATS server until ctx ends.
func node(ctx context.Context, c embedded.Config) error {
	s, err := embedded.Start(c)
	if err != nil {
		return err
	}
	<-ctx.Done()
	s.Close()
	return nil
}

// open opens the store. Several processes may do so: those that enqueue, and workers.
func open(url string) (*natsstore.Store, *nats.Conn, error) {
	nc, err := natsstore.Connect(url)
	if err != nil {
		return nil, nil, err
	}
	store, err := natsstore.New(nc, natsstore.Options{Name: "shop-outbox", Replicas: replicas, Lease: 5 * time.Second})
	if err != nil {
		nc.Close()
	}
	return store, nc, err
}

// worker sends until ctx ends. Then it finishes what is in progress.
func worker(ctx context.Context, natsURL, smtpURL string) (err error) {
	cfg, err := smtprelay.ParseURL(smtpURL)
	if err != nil {
		return fmt.Errorf("SMTP_URL: %w", err)
	}
	store, nc, err := open(natsURL)
	if err != nil {
		return err
	}
	defer nc.Close()
	defer func() { err = errors.Join(err, store.Close()) }()
	js, err := jetstream.New(nc)
	if err != nil {
		return err
	}
	slots, err := natsslots.New(ctx, js, "shop-relay-slots", connections, natsslots.Options{Replicas: replicas, TTL: 8 * time.Second})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, slots.Close()) }()
	cfg.Limits.Slots = slots
	client, err := smtprelay.New(cfg)
	if err != nil {
		return err
	}
	defer client.Close()
	box, err := outbox.New(outbox.Config{Store: store, Client: client, Retry: outbox.Retry{First: 5 * time.Second}, Ended: func(i outbox.Item) {
		if i.State == outbox.Dead || i.State == outbox.Unknown { // the rest is retried
			slog.Warn("mail", "id", i.ID, "state", i.State.String(), "attempts", i.Attempts, "reason", i.Reason)
		}
	}})
	if err != nil {
		return err
	}
	if err := box.Run(ctx); err != nil {
		return err
	}
	end, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	return client.Shutdown(end)
}

// withBox calls f with the outbox of a process that sends nothing.
func withBox(url string, f func(*outbox.Outbox) error) error {
	store, nc, err := open(url)
	if err != nil {
		return err
	}
	defer nc.Close()
	defer store.Close()
	box, err := outbox.New(outbox.Config{Store: store, Route: func(outbox.Item) *smtprelay.Client { return nil }})
	if err != nil {
		return err
	}
	return f(box)
}

// list prints what a person may have to check.
func list(ctx context.Context, box *outbox.Outbox) error {
	for _, state := range []outbox.State{outbox.Queued, outbox.Sending, outbox.Unknown, outbox.Dead} {
		for i, err := range box.List(ctx, state) {
			if err != nil {
				return err
			}
			fmt.Printf("%-8v %s to %s, due %s: %s\n", i.State, i.ID, strings.Join(i.To, ", "), i.Due.Format(time.DateTime), cmp.Or(i.Reason, "not tried yet"))
		}
	}
	return nil
}
