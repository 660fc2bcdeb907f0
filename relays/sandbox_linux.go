package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"unsafe"
)

// The program starts itself again in its own namespaces. There the relays live in a network without a way out, on mounts that the
// machine does not see, in a process tree that the kernel ends with its first process: however the suite ends, it leaves no
// process, port, mount or mail, and it does not touch the machine's own mail server.
const (
	stageSuite = "suite" // runs the suite; its suiteOrder comes on standard input
	stageEnter = "enter" // runs one command in a relay's root, with the machine's network
	stageEnv   = "SMTPRELAY_RELAYS_STAGE"
)

const (
	withNetwork    = syscall.CLONE_NEWNS | syscall.CLONE_NEWPID
	withoutNetwork = withNetwork | syscall.CLONE_NEWNET | syscall.CLONE_NEWUTS | syscall.CLONE_NEWIPC
)

// modulesInRoot is where a relay that runs on Node.js finds its node_modules.
const modulesInRoot = "/opt/relay"

// enterOrder is the input of stageEnter.
type enterOrder struct {
	Dir   string
	Relay fetched
	Args  []string
}

// reexec returns a command that runs this program again as a stage. When ctx ends, the stage is killed and, since it is the first
// process of its namespace, everything that it has started. The caller's thread must stay alive meanwhile (see main): the stage
// is killed when the thread ends.
func reexec(ctx context.Context, stage string, namespaces uintptr) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Env = append(os.Environ(), stageEnv+"="+stage)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: namespaces, Pdeathsig: syscall.SIGKILL}
	return cmd
}

// runStage runs the stage that the environment names, and reports whether it names one.
func runStage() (ran bool, err error) {
	stage := os.Getenv(stageEnv)
	if stage == "" {
		return false, nil
	}
	os.Unsetenv(stageEnv)
	// The first process of a namespace gets only the signals that it handles. The parent kills it when it is interrupted itself,
	// so a signal from the terminal is ignored here.
	signal.Ignore(syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	in, err := io.ReadAll(os.Stdin)
	if err != nil {
		return true, err
	}
	switch stage {
	case stageEnter:
		return true, enter(in)
	case stageSuite:
		return true, runSuite(in)
	}
	return true, fmt.Errorf("unknown stage %q", stage)
}

func enter(in []byte) error {
	var order enterOrder
	if err := json.Unmarshal(in, &order); err != nil {
		return err
	}
	b, err := newBox(order.Dir)
	if err != nil {
		return err
	}
	root, err := b.newRoot(order.Relay, true)
	if err != nil {
		return err
	}
	cmd := exec.Command(order.Args[0], order.Args[1:]...)
	if cmd.Path, err = lookIn(root, order.Args[0]); err != nil {
		return err
	}
	cmd.Err = nil
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root}
	out, err := cmd.CombinedOutput()
	os.Stdout.Write(out)
	return err
}

// lookIn finds a program below a root, and returns its path as seen from inside.
func lookIn(root, program string) (string, error) {
	if strings.Contains(program, "/") {
		return program, nil
	}
	for _, dir := range []string{"/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"} {
		if _, err := os.Lstat(filepath.Join(root, dir, program)); err == nil {
			return filepath.Join(dir, program), nil
		}
	}
	return "", fmt.Errorf("%s is not in the relay's root", program)
}

// box is the mount namespace in which the relays' roots are created.
type box struct {
	dir    string            // the cache
	work   string            // a file system in memory: unpacked packages, and what the relays write
	layers map[string]string // folder of Debian packages → where they were unpacked
}

// newBox prepares the mount namespace of this process, which must be a private one.
func newBox(dir string) (*box, error) {
	if os.Getpid() != 1 {
		return nil, errors.New("bug: newBox outside a private namespace")
	}
	if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
		return nil, fmt.Errorf("making the mounts private: %w", err)
	}
	b := &box{dir: dir, work: filepath.Join(dir, "run"), layers: make(map[string]string)}
	if err := os.MkdirAll(b.work, 0o755); err != nil {
		return nil, err
	}
	if err := syscall.Mount("tmpfs", b.work, "tmpfs", 0, "mode=755"); err != nil {
		return nil, fmt.Errorf("tmpfs on %s: %w", b.work, err)
	}
	if err := syscall.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return nil, fmt.Errorf("proc: %w", err)
	}
	return b, nil
}

// layer unpacks a folder of packages, once. It must not be in the machine's root file system: the layers of an overlay must not
// contain each other.
func (b *box) layer(debs string) (string, error) {
	if at := b.layers[debs]; at != "" {
		return at, nil
	}
	files, err := debFiles(debs)
	if err != nil {
		return "", err
	}
	at := filepath.Join(b.work, "unpacked", filepath.Base(debs))
	if err := os.MkdirAll(at, 0o755); err != nil {
		return "", err
	}
	// If /lib is a link to /usr/lib it must be one in the layer too: a folder there would hide the machine's.
	for _, name := range []string{"bin", "sbin", "lib", "lib32", "lib64", "libx32"} {
		target, err := os.Readlink("/" + name)
		if err != nil {
			continue
		}
		if err := errors.Join(os.MkdirAll(filepath.Join(at, target), 0o755), os.Symlink(target, filepath.Join(at, name))); err != nil {
			return "", err
		}
	}
	for _, file := range files {
		// Like dpkg -x, but a folder does not replace such a link.
		if err := command(context.Background(), "sh", "-c",
			`dpkg-deb --fsys-tarfile "$1" | tar --extract --preserve-permissions --keep-directory-symlink --directory "$2"`,
			"sh", file, at); err != nil {
			return "", err
		}
	}
	b.layers[debs] = at
	return at, nil
}

// newRoot lays the unpacked packages over the machine's own root, and on top a folder in memory that takes every write.
func (b *box) newRoot(f fetched, writableModules bool) (root string, err error) {
	base := filepath.Join(b.work, f.Name)
	root = filepath.Join(base, "root")
	upper, scratch := filepath.Join(base, "upper"), filepath.Join(base, "scratch")
	for _, dir := range []string{root, upper, scratch} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return "", err
		}
	}
	var lower []string
	for _, debs := range f.Debs {
		at, err := b.layer(debs)
		if err != nil {
			return "", err
		}
		lower = append(lower, at)
	}
	options := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", strings.Join(append(lower, "/"), ":"), upper, scratch)
	if err := syscall.Mount("overlay", root, "overlay", 0, options); err != nil {
		return "", fmt.Errorf("overlay (%s): %w", options, err)
	}
	for _, m := range []struct {
		source, target, kind string
		flags                uintptr
	}{
		{"/dev", "dev", "", syscall.MS_BIND | syscall.MS_REC},
		{"/proc", "proc", "", syscall.MS_BIND | syscall.MS_REC},
		{"tmpfs", "tmp", "tmpfs", 0},
	} {
		target := filepath.Join(root, m.target)
		if err := os.MkdirAll(target, 0o755); err != nil {
			return "", err
		}
		if err := syscall.Mount(m.source, target, m.kind, m.flags, ""); err != nil {
			return "", fmt.Errorf("mount %s: %w", target, err)
		}
	}
	if err := os.Chmod(filepath.Join(root, "tmp"), 0o777|os.ModeSticky); err != nil {
		return "", err
	}
	if f.Modules == "" {
		return root, nil
	}
	target := filepath.Join(root, modulesInRoot)
	if err := os.MkdirAll(target, 0o755); err != nil {
		return "", err
	}
	if err := syscall.Mount(f.Modules, target, "", syscall.MS_BIND, ""); err != nil {
		return "", fmt.Errorf("mount %s: %w", target, err)
	}
	if writableModules {
		// npm needs the machine's resolver, whose file may be a link into /run.
		run := filepath.Join(root, "run")
		return root, syscall.Mount("/run", run, "", syscall.MS_BIND|syscall.MS_REC, "")
	}
	return root, syscall.Mount("", target, "", syscall.MS_BIND|syscall.MS_REMOUNT|syscall.MS_RDONLY, "")
}

// loopbackUp brings up the only interface of a new network namespace.
func loopbackUp() error {
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_DGRAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer syscall.Close(fd)
	request := struct {
		name  [syscall.IFNAMSIZ]byte
		flags uint16
		_     [22]byte
	}{flags: syscall.IFF_UP | syscall.IFF_RUNNING}
	copy(request.name[:], "lo")
	if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, uintptr(fd), syscall.SIOCSIFFLAGS, uintptr(unsafe.Pointer(&request))); errno != 0 {
		return fmt.Errorf("bringing up the loopback interface: %w", errno)
	}
	return nil
}

// startIn starts a program in a root, as the first process of its own namespace: killing it kills all of the relay. A relay that
// is a daemon must be told to stay in the foreground.
func startIn(root string, args []string, output io.Writer) (*exec.Cmd, error) {
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8", "HOME=/root"}
	cmd.Stdout, cmd.Stderr = output, output
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root, Cloneflags: syscall.CLONE_NEWPID, Setsid: true}
	path, err := lookIn(root, args[0])
	if err != nil {
		return nil, err
	}
	cmd.Path, cmd.Err = path, nil
	return cmd, cmd.Start()
}

// runIn runs a program in a root and waits for its end.
func runIn(root string, args ...string) error {
	var out bytes.Buffer
	cmd, err := startIn(root, args, &out)
	if err != nil {
		return err
	}
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("%s: %w\n%s", strings.Join(args, " "), err, out.Bytes())
	}
	return nil
}

// keepThread pins the main goroutine to its thread. Linux treats the end of the thread that started a process as the end of the
// parent, and would kill the stages.
func keepThread() { runtime.LockOSThread() }
