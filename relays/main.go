// Command relays runs the conformance suite against real relays.
//
// It fetches Postfix, Exim, OpenSMTPD, Haraka, aiosmtpd, nodemailer's smtp-server, nginx's mail proxy and go-smtp's server
// (Debian and npm packages, Go modules), runs each in its own namespaces on loopback, sends through it with smtprelay, and
// compares what the client reported with what the relay has queued. It needs Linux and root.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// suiteOrder is the input of stageSuite.
type suiteOrder struct {
	Dir     string
	Relays  []fetched // available or not, in the table's order
	Check   string    // only checks with this in their name
	Verbose bool
	Speed   bool // measure, without checks
}

func main() {
	keepThread()
	ran, err := runStage()
	if !ran {
		err = run()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "relays:", err)
		os.Exit(1)
	}
}

func run() error {
	only := flag.String("only", "", "run only these relays, separated by commas, and fail if one of them is unavailable")
	check := flag.String("check", "", "run only the checks with this in their name")
	speed := flag.Bool("speed", false, "compare a single sender with net/smtp, without checks")
	verbose := flag.Bool("v", false, "print the dialogues")
	flag.Usage = func() {
		fmt.Fprintln(flag.CommandLine.Output(), "usage: go run . [flags]\n\nThe packages are kept in $RELAYS_DIR, or in smtprelay-relays below the user's cache folder.")
		flag.PrintDefaults()
	}
	flag.Parse()
	if os.Geteuid() != 0 {
		return fmt.Errorf("only root can make the namespaces that the relays run in")
	}
	wanted := relays
	if *only != "" {
		wanted = nil
		for name := range strings.SplitSeq(*only, ",") {
			i := slices.IndexFunc(relays, func(r relay) bool { return r.name == name })
			if i < 0 {
				return fmt.Errorf("unknown relay %q; the relays are: %s", name, names(relays))
			}
			wanted = append(wanted, relays[i])
		}
	}
	dir := os.Getenv("RELAYS_DIR")
	if dir == "" {
		cache, err := os.UserCacheDir()
		if err != nil {
			return err
		}
		dir = filepath.Join(cache, "smtprelay-relays")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()

	order := suiteOrder{Dir: dir, Check: *check, Verbose: *verbose, Speed: *speed}
	missing := 0
	for _, r := range wanted {
		fmt.Printf("fetching %s\n", r.name)
		f, err := fetch(ctx, dir, r)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			fmt.Printf("%s is unavailable: %v\n", r.name, err)
			f.Missing = err.Error()
			missing++
		}
		order.Relays = append(order.Relays, f)
	}
	if missing == len(wanted) {
		return fmt.Errorf("no relay is available")
	}
	in, err := json.Marshal(order)
	if err != nil {
		return err
	}
	cmd := reexec(ctx, stageSuite, withoutNetwork)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(in), os.Stdout, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("the suite: %w", err)
	}
	if *only != "" && missing > 0 {
		return fmt.Errorf("%d of the relays asked for are unavailable", missing)
	}
	return nil
}

func names(rs []relay) string {
	var all []string
	for _, r := range rs {
		all = append(all, r.name)
	}
	return strings.Join(all, ", ")
}
