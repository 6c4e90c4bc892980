//! The life of a virtual CPU's thread, and its owner's side of it.

use std::io;
use std::sync::Arc;
use std::sync::Condvar;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;

use kvm_ioctls::VcpuFd;

use super::exit;
use super::exit::Exit;
use super::kick;
use super::kick::Kickable;
use crate::bus::Bus;
use crate::end::End;
use crate::end::EndReason;
use crate::pio;
use crate::seccomp::ThreadKind;
use crate::threads::StuckThread;
use crate::threads::Thread;
use crate::threads::ThreadSetup;

/// How long a virtual CPU may take to stand still. It only ever needs longer than microseconds if
/// it waits for a device to be reset, which has a shorter deadline.
const STAND_STILL_DEADLINE: Duration = Duration::from_secs(10);

/// How long a thread may take to end once it was asked to.
pub(crate) const JOIN_DEADLINE: Duration = STAND_STILL_DEADLINE;

/// A virtual CPU runs on.
#[derive(Debug, thiserror::Error)]
#[error("virtual CPU {id} does not stand still after {STAND_STILL_DEADLINE:?}")]
pub struct PauseError {
    /// Which one.
    id: u8,
}

/// A virtual CPU that is ready to run.
pub(crate) struct Vcpu {
    pub(crate) id: u8,
    pub(crate) fd: VcpuFd,
    pub(crate) bus: Arc<Bus>,
    pub(crate) end: Arc<End>,
    pub(crate) exits: Arc<ExitCounters>,
}

/// Exits to this process, by all virtual CPUs.
#[derive(Debug, Default)]
pub struct ExitCounters {
    io: AtomicU64,
    mmio: AtomicU64,
}

impl ExitCounters {
    /// Accesses to ports.
    #[must_use]
    pub fn io(&self) -> u64 {
        self.io.load(Ordering::Relaxed)
    }

    /// Accesses to registers of devices.
    #[must_use]
    pub fn mmio(&self) -> u64 {
        self.mmio.load(Ordering::Relaxed)
    }

    fn count(&self, exit: &Exit<'_>) {
        let counter = match exit {
            Exit::PortRead { .. } | Exit::PortWrite { .. } => &self.io,
            Exit::MmioRead { .. } | Exit::MmioWrite { .. } => &self.mmio,
            Exit::TripleFault | Exit::Interrupted => return,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// The owner's side of a virtual CPU's thread.
pub(crate) struct VcpuThread {
    id: u8,
    thread: Thread,
    orders: Arc<Orders>,
}

impl VcpuThread {
    /// Starts the thread. The virtual CPU is paused.
    pub(crate) fn spawn(vcpu: Vcpu, setup: &ThreadSetup) -> io::Result<Self> {
        let id = vcpu.id;
        let orders = Arc::new(Orders::default());
        let taken = Arc::clone(&orders);
        let name = format!("vcpu {id}");
        let thread = Thread::spawn(ThreadKind::Vcpu, &name, setup, move || vcpu.live(&taken))?;
        Ok(Self { id, thread, orders })
    }

    /// Lets the guest run.
    pub(crate) fn resume(&self) {
        self.orders.give(Order::Run);
    }

    /// Asks the virtual CPU to stand still; [`Self::await_still`] waits for it.
    pub(crate) fn ask_to_pause(&self) {
        self.orders.give(Order::Pause);
        kick::kick(self.thread.handle());
    }

    /// Waits until the virtual CPU stands between two instructions.
    pub(crate) fn await_still(&self) -> Result<(), PauseError> {
        if self.orders.await_still(STAND_STILL_DEADLINE) {
            Ok(())
        } else {
            Err(PauseError { id: self.id })
        }
    }

    /// Asks the thread to end; [`Self::join`] waits for it.
    pub(crate) fn ask_to_end(&self) {
        self.orders.give(Order::End);
        kick::kick(self.thread.handle());
    }

    /// Waits for the end of the thread.
    pub(crate) fn join(self) -> Result<(), StuckThread> {
        self.thread.join_within(JOIN_DEADLINE)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Order {
    #[default]
    Pause,
    Run,
    End,
}

/// What a virtual CPU is told, and whether it stands still.
#[derive(Default)]
struct Orders {
    state: Mutex<OrdersState>,
    changed: Condvar,
}

#[derive(Default)]
struct OrdersState {
    order: Order,
    is_still: bool,
}

impl Orders {
    fn give(&self, order: Order) {
        let mut state = self.lock();
        // The end is final.
        if state.order != Order::End {
            state.order = order;
            // What is seen until the thread has looked is from before the order.
            state.is_still &= order == Order::Pause;
        }
        self.changed.notify_all();
    }

    fn current(&self) -> Order {
        self.lock().order
    }

    /// Says that the virtual CPU stands still, and waits for an order to do something else.
    fn await_order(&self) -> Order {
        let mut state = self.lock();
        while state.order == Order::Pause {
            state.is_still = true;
            self.changed.notify_all();
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.is_still = false;
        state.order
    }

    /// Says that the virtual CPU will never run again.
    fn stand_still_forever(&self) {
        let mut state = self.lock();
        state.order = Order::End;
        state.is_still = true;
        self.changed.notify_all();
    }

    fn await_still(&self, deadline: Duration) -> bool {
        let (_state, wait) = self
            .changed
            .wait_timeout_while(self.lock(), deadline, |state| !state.is_still)
            .unwrap_or_else(PoisonError::into_inner);
        !wait.timed_out()
    }

    fn lock(&self) -> MutexGuard<'_, OrdersState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Says that the thread is over, however it ends.
struct Farewell<'a>(&'a Orders);

impl Drop for Farewell<'_> {
    fn drop(&mut self) {
        self.0.stand_still_forever();
    }
}

#[derive(Debug, Clone, Copy)]
enum State {
    Paused,
    Running,
    Ended,
}

impl Vcpu {
    fn live(mut self, orders: &Orders) {
        let _farewell = Farewell(orders);
        let kickable = Kickable::new(&mut self.fd);
        let mut state = State::Paused;
        loop {
            state = match state {
                State::Paused => self.paused(orders),
                State::Running => self.running(orders),
                State::Ended => break,
            };
        }
        drop(kickable);
    }

    fn paused(&self, orders: &Orders) -> State {
        match orders.await_order() {
            Order::Pause => State::Paused,
            Order::Run => {
                // The guest must not take the pause for a CPU that hangs. Before it has set up its
                // clock there is nothing to tell, and KVM says so.
                let _ = self.fd.kvmclock_ctrl();
                State::Running
            }
            Order::End => State::Ended,
        }
    }

    fn running(&mut self, orders: &Orders) -> State {
        loop {
            let exit = match exit::run(self.id, &mut self.fd) {
                Ok(exit) => exit,
                Err(error) => {
                    self.end.report(EndReason::Failed(error));
                    return State::Ended;
                }
            };
            self.exits.count(&exit);
            match answer(&self.bus, exit) {
                Next::Run => {}
                Next::LookAtOrders => {
                    // First, so that a kick after the look is not lost.
                    self.fd.set_kvm_immediate_exit(0);
                    match orders.current() {
                        Order::Run => {}
                        Order::Pause => return State::Paused,
                        Order::End => return State::Ended,
                    }
                }
                Next::End(reason) => {
                    self.end.report(reason);
                    return State::Ended;
                }
            }
        }
    }
}

/// What follows from an exit.
#[derive(Debug)]
enum Next {
    Run,
    LookAtOrders,
    End(EndReason),
}

/// Does what the guest wants.
fn answer(bus: &Bus, exit: Exit<'_>) -> Next {
    match exit {
        Exit::PortRead { port, data } => pio::read(port, data),
        Exit::PortWrite { port, data } => {
            if let Some(reason) = pio::write(port, data) {
                return Next::End(reason);
            }
        }
        // As on real hardware.
        Exit::MmioRead { data } => data.fill(0xff),
        Exit::MmioWrite { address, data } => bus.write(address, data),
        Exit::TripleFault => return Next::End(EndReason::TripleFault),
        Exit::Interrupted => return Next::LookAtOrders,
    }
    Next::Run
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    const DEADLINE: Duration = Duration::from_secs(10);

    fn write(port: u16, byte: u8) -> Next {
        let exit = Exit::PortWrite {
            port,
            data: &[byte],
        };
        answer(&Bus::new(Vec::new()), exit)
    }

    #[test]
    fn only_the_right_byte_powers_off() {
        assert!(matches!(write(0x600, 1), Next::Run));
        assert!(matches!(write(0x601, 0), Next::Run));
        assert!(matches!(write(0x600, 0), Next::End(EndReason::Stopped)));
    }

    #[test]
    fn only_the_right_command_resets() {
        assert!(matches!(write(0x64, 0), Next::Run));
        assert!(matches!(write(0x60, 0xfe), Next::Run));
        assert!(matches!(write(0x64, 0xfe), Next::End(EndReason::Reset)));
    }

    #[test]
    fn a_write_of_nothing_is_ignored() {
        let exit = Exit::PortWrite {
            port: 0x600,
            data: &[],
        };

        assert!(matches!(answer(&Bus::new(Vec::new()), exit), Next::Run));
    }

    #[test]
    fn absent_ports_and_addresses_read_as_ones() {
        let bus = Bus::new(Vec::new());
        let (mut port, mut mmio) = ([0; 2], [0; 4]);

        answer(
            &bus,
            Exit::PortRead {
                port: 0x3f8,
                data: &mut port,
            },
        );
        answer(&bus, Exit::MmioRead { data: &mut mmio });

        assert_eq!((port, mmio), ([0xff; 2], [0xff; 4]));
    }

    #[test]
    fn the_keyboard_controller_takes_commands() {
        let mut status = [0xff];

        answer(
            &Bus::new(Vec::new()),
            Exit::PortRead {
                port: 0x64,
                data: &mut status,
            },
        );

        assert_eq!(status, [0]);
    }

    #[test]
    fn the_end_is_final() {
        let orders = Orders::default();

        orders.give(Order::End);
        orders.give(Order::Run);

        assert_eq!(orders.await_order(), Order::End);
    }

    #[test]
    fn a_virtual_cpu_that_runs_does_not_stand_still() {
        let orders = Orders::default();
        orders.give(Order::Run);
        orders.await_order();

        assert!(!orders.await_still(Duration::from_millis(1)));
    }

    #[test]
    fn a_thread_that_has_ended_stands_still() {
        let orders = Arc::new(Orders::default());
        let theirs = Arc::clone(&orders);
        let thread = thread::spawn(move || {
            let _farewell = Farewell(&theirs);
        });

        assert!(orders.await_still(DEADLINE));
        thread.join().unwrap();
    }
}
